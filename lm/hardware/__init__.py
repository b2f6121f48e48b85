"""Chips, topologies that are not here, and the cost of a compiled program."""
