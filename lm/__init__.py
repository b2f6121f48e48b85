"""Shared primitives for the whole life of a language model."""
