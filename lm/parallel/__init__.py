"""What devices exchange beyond what a constraint can say."""

from lm.parallel.distribute import distribute_matrices
from lm.parallel.ring import ring_attention
from lm.parallel.strategies import WAYS, check_context, context_attention, in_order_of
from lm.parallel.ulysses import ulysses_attention
from lm.parallel.zigzag import Zigzag, unzigzag, zigzag, zigzag_order

__all__ = [
    "WAYS",
    "Zigzag",
    "check_context",
    "context_attention",
    "distribute_matrices",
    "in_order_of",
    "ring_attention",
    "ulysses_attention",
    "unzigzag",
    "zigzag",
    "zigzag_order",
]
