"""Makes the tables of launch configurations of the Triton kernels: `python -m bench.tune [--dry]`.

The tables are `ztok_fast/ops/*/triton_configs.py`. Every family has a module here that lists, for each key of its
tables, the candidates and what to time them on. On a machine with a CUDA device each candidate is timed (median of CUDA
events, cold L2) and the fastest is printed as a line for the table. With --dry nothing is timed and no GPU is needed:
candidates are compiled ahead of time for the architectures, and registers, spills and shared memory are printed; the
checked-in entries were chosen from that.
"""
