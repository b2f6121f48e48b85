"""Tokenized documents, pack plans, data order and batches.

The order of the data is arithmetic over a pack plan: a step reads the global rows after those of
the step before, a global row names a source and a row of its plan, a row names pieces of documents.
A checkpoint stores the step, the stages and skips so far, and the hashes of the plans.
"""

from lm.data.batches import Batches, HeldOut
from lm.data.mixtures import Share
from lm.data.ngram import ByteNgram
from lm.data.order import permute
from lm.data.packed import PackedSource, pack_source
from lm.data.packing import PackPlan, open_plan, pack
from lm.data.prefetch import Prefetcher
from lm.data.sources import ArraySource, Document, open_source, write_dataset
from lm.data.stages import DataStage

__all__ = [
    "ArraySource",
    "Batches",
    "ByteNgram",
    "DataStage",
    "Document",
    "HeldOut",
    "PackPlan",
    "PackedSource",
    "Prefetcher",
    "Share",
    "open_plan",
    "open_source",
    "pack",
    "pack_source",
    "permute",
    "write_dataset",
]
