"""The only place that knows of ranks."""
