"""`python -m experiments.benchmark train|kernels`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("experiments.benchmark.train", run_name="__main__")
