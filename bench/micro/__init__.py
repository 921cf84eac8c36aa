"""Micro-benchmarks of the ops: a registry of ops x shapes x backends x peers, and what times them.

`docs/benchmarks.md` describes the method. The command is `python -m bench`.
"""
