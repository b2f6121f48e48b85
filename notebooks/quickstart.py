# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A language model, from text to samples
#
# Everything `make demo` does, by hand and small: a corpus found on this machine, a tokenizer,
# packed rows, a Llama-style model, a sharded training step, and samples. About a minute on two
# cores; the same code runs on a GPU or a TPU.
#
# On Colab, first: `!git clone` this repository, `%cd` into it, and `%pip install -q -e .[report]`.

# %%
import math
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp

from data_pipelines import local_text
from lm.data.batches import Batches, HeldOut
from lm.infer.generate import LocalSampler
from lm.infer.requests import Request
from lm.model import (
    Attention,
    FeedForward,
    Layer,
    ModelConfig,
    Stack,
    num_params,
    param_specs,
)
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, named_sharding
from lm.train.accumulation import Accumulation
from lm.train.objective import NextToken
from lm.train.optimizers import Muon, make_optimizer
from lm.train.schedules import Schedule
from lm.train.state import init_state
from lm.train.step import make_eval_step, make_train_step

NUM_STEPS = int(os.environ.get("NUM_STEPS", "100"))
folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## Text
#
# Two megabytes of Python's documentation, docstrings and source; a SentencePiece tokenizer is
# trained on them, and the documents become a TFDS dataset of tokens.

# %%
text = local_text.build(folder / "data", vocab_size=1024, max_bytes=2_000_000, progress=False)
tokenizer = text.tokenizer()
print(tokenizer.encode("def main():"))

# %% [markdown]
# Documents are packed into rows of 128 tokens. Which rows a step reads is arithmetic on its number,
# so any step can be looked at, on any machine, at any time.

# %%
packed = text.packed("train", 128)
held_out = HeldOut(text.packed("validation", 128), 16)
batches = Batches([packed], batch_size=16)
batch = batches.host_batch(step=7)
print({name: array.shape for name, array in batch.items()})
print(tokenizer.decode(batch["ids"][0][batch["segment_ids"][0] == 1])[:200])

# %% [markdown]
# ## Model
#
# A model is a frozen dataclass and a tree of weights.

# %%
layer = Layer(Attention(num_heads=4, num_kv_heads=2, head_dim=32), FeedForward(hidden_dim=352))
config = ModelConfig(
    vocab_size=1024, embed_dim=128, stacks=(Stack((layer,), 3),), tied=True, max_length=256
)
print(f"{num_params(config):,} weights")

# %% [markdown]
# ## Training
#
# The mesh says which devices there are, the rules how arrays are sharded. `MeshShape(fsdp=-1)` is
# ZeRO-3 over all devices; on one device the same code runs unsharded.

# %%
layout = Layout(make_mesh(MeshShape(fsdp=1)), make_rules(zero=3))
rows = named_sharding(layout.mesh, layout.rules.activations, ("batch", "sequence"))
schedule = Schedule("cosine", peak=1e-2, warmup_steps=10, num_steps=NUM_STEPS)
optimizer = make_optimizer(Muon())
objective, gradient = NextToken(), Accumulation(config, dtype=jnp.bfloat16)
step = make_train_step(objective, optimizer, schedule, layout, gradient)
evaluate = make_eval_step(objective, layout, gradient)
state = init_state(param_specs(config), optimizer, jax.random.key(0), layout)


def bits_per_byte(params) -> float:
    batches = (held_out.device_batch(i, rows) for i in range(len(held_out)))
    nats = sum(float(evaluate(params, batch)["loss"].sum) for batch in batches)
    return nats / math.log(2) / held_out.num_bytes


before = bits_per_byte(state.params)
losses = []
for i in range(NUM_STEPS):
    state, metrics = step(state, batches.device_batch(i, rows))
    losses.append(float(metrics["loss"]))
    if i % 10 == 0:
        print(f"step {i:4d}  loss {losses[-1]:.3f}")
after = bits_per_byte(state.params)
print(f"held-out bits per byte: {before:.2f} before, {after:.2f} after")

# %% [markdown]
# ## Samples

# %%
sampler = LocalSampler(state.params, config, tokenizer=tokenizer)
prompt = tokenizer.encode("def main(", bos=True)
request = Request(prompt=prompt, max_new_tokens=48, temperature=0.7)
print("def main(" + (sampler.sample([request])[0].text or ""))
