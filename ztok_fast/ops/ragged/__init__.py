"""Ragged batches: between padded and packed layout, and packing several sources per sequence."""
