"""Measurements, and scripts that write them into the documents: `python -m bench.<name>` in a checkout."""
