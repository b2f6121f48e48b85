"""GPTQ, AWQ, compressed-tensors and bitsandbytes directories."""
