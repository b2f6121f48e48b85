"""Comparisons with peers: `python -m experiments.benchmark train|kernels|generate`."""
