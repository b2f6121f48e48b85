"""Frozen dataclasses from the command line and from JSON, and programs that read them. No JAX."""
