"""Tokenized documents, pack plans, data order and batches.

The order of the data is arithmetic over a pack plan: step n is global rows [nB, (n+1)B), a global
row names a source and a row of its plan, a row names pieces of documents. Nothing here holds state
that a checkpoint would need beyond the step.
"""

from lm.data.batches import Batches, HeldOut, PackedSource, Prefetcher
from lm.data.ngram import ByteNgram
from lm.data.order import mixture_source, permute
from lm.data.packing import PackPlan, open_plan, pack
from lm.data.sources import ArraySource, Document, TokenSource, open_source, write_dataset

__all__ = [
    "ArraySource",
    "Batches",
    "ByteNgram",
    "Document",
    "HeldOut",
    "PackPlan",
    "PackedSource",
    "Prefetcher",
    "TokenSource",
    "mixture_source",
    "open_plan",
    "open_source",
    "pack",
    "permute",
    "write_dataset",
]
