"""Measurements of lacfast: `python -m bench.NAME` from a checkout. Nothing here is installed."""
