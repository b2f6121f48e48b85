"""Generation. Importing this loads no JAX; the engine is in `lm.infer.generate`."""

from lm.infer.requests import Grammar, Messages, Request, Sample, Sampler, expand

__all__ = ["Grammar", "Messages", "Request", "Sample", "Sampler", "expand"]
