"""Self-contained HTML pages: of a demo, and of any training run."""
