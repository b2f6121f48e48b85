"""The sizes that a run's mesh must divide, checked before anything is computed."""

from __future__ import annotations

from lm.model import ModelConfig, check_layout
from lm.parallel import check_context
from lm.sharding import Layout, Sharding, check_divides


def check_sizes(
    model: ModelConfig, layout: Layout, sharding: Sharding, *, batch_size: int,
    num_micro_batches: int, sequence_length: int,
) -> None:  # fmt: skip
    """Raises ValueError where a size is not divided, or rows are longer than the model allows."""
    mesh, activations = layout.mesh, layout.rules.activations
    if not 1 <= sequence_length <= model.max_length:
        raise ValueError(
            f"train.sequence_length={sequence_length} is not between 1 and model.max_length="
            f"{model.max_length}; shorten the rows or raise the model's length"
        )
    check_layout(model, layout)
    if num_micro_batches < 1 or batch_size % num_micro_batches:
        raise ValueError(
            f"train.num_micro_batches={num_micro_batches} does not divide the {batch_size} rows of "
            "a step"
        )
    per_micro_batch = batch_size // num_micro_batches
    check_divides(mesh, activations["batch"], "the rows of a micro-batch", per_micro_batch)
    check_divides(mesh, activations["residual_sequence"], "sequence_length", sequence_length)
    heads = [(a.num_heads, a.num_kv_heads) for a in (x.attention for x in model.layers)]
    check_context(sharding.context, layout, sequence_length, heads)
