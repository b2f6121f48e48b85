"""GGUF and safetensors files: containers, blocks and where packaged models lie. Without JAX."""
