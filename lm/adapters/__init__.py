"""Parameter-efficient adapters: add, train, combine, select, merge."""

from lm.adapters.lora import add_lora, combine, count, linear_layers, merge, remove, select, trains

__all__ = [
    "add_lora",
    "combine",
    "count",
    "linear_layers",
    "merge",
    "remove",
    "select",
    "trains",
]
