"""Configurations: plain functions that return frozen dataclasses."""
