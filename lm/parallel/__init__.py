"""What devices exchange beyond what a constraint can say."""

from lm.parallel.distribute import distribute_matrices
from lm.parallel.ring import ring_attention
from lm.parallel.strategies import (
    STRATEGIES,
    check_context,
    choose_strategy,
    context_attention,
    reorder_for,
)
from lm.parallel.ulysses import ulysses_attention
from lm.parallel.zigzag import Zigzag, zigzag_order

__all__ = [
    "STRATEGIES",
    "Zigzag",
    "check_context",
    "choose_strategy",
    "context_attention",
    "distribute_matrices",
    "reorder_for",
    "ring_attention",
    "ulysses_attention",
    "zigzag_order",
]
