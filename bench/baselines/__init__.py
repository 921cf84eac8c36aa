"""Baselines of the ops: what other libraries, or plain torch, take for the same work, and marks to measure it by."""
