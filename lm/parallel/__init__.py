"""What devices exchange beyond what a constraint can say."""

from lm.parallel.dealing import deal
from lm.parallel.ring import ring_attention
from lm.parallel.ulysses import ulysses_attention
from lm.parallel.zigzag import Zigzag, unzigzag, zigzag, zigzag_order

__all__ = [
    "Zigzag",
    "deal",
    "ring_attention",
    "ulysses_attention",
    "unzigzag",
    "zigzag",
    "zigzag_order",
]
