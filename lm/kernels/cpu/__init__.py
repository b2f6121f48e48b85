"""What only CPUs run: kernels in C++ behind `jax.ffi`, built where they first run."""
