"""Measurements and the scripts that write them into the documents; run from a checkout as ``python -m bench.<name>``."""
