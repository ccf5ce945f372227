"""Rank 9: benchmarks that a user runs, each op beside its peers on this machine.

`names` can be imported without torch; `run.kernels` does the work.
"""
