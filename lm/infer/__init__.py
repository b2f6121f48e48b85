"""Generation. Importing this loads no JAX; the engine is in `lm.infer.generate`."""

from lm.infer.requests import Request, Sample, Sampler

__all__ = ["Request", "Sample", "Sampler"]
