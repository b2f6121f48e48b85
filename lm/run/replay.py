"""The batch of a step of a run, through changes and rewinds, and the loss of each of its tokens."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from lm.checkpoints import DamagedError, open_checkpoint
from lm.config.command_line import ConfigError, input_errors
from lm.data.batches import Batches
from lm.model import Head, Output, Tokens
from lm.run import metrics as metrics_lib
from lm.run.parts import Run
from lm.train.objective import Batch, NextToken, Objective, Term
from lm.train.step import make_eval_step

Tree = Any
CONTEXT = 16  # tokens shown before a bad one


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One of the times a step was taken.

    Attributes:
      skips: (step, rows) of the data skipped by then.
      last_checkpoint: the last step whose weights this attempt may have gone through.
    """

    skips: tuple[tuple[int, int], ...]
    last_checkpoint: int


@dataclasses.dataclass(frozen=True)
class PerToken(Objective):
    """The loss of every token by itself: the term's sum and count are arrays [B, T]."""

    def inputs(self, batch: Batch) -> Tokens:
        return NextToken().inputs(batch)

    def loss(self, head: Head, output: Output, batch: Batch, rng: jax.Array) -> dict[str, Term]:
        logprobs, _ = head.logprobs(output.hidden, batch["targets"])
        return {"loss": Term(-logprobs, batch["weights"])}


def data_state(run: Run) -> dict[str, Any]:
    """What the last sound checkpoint records of the data's order."""
    for step in reversed(run.checkpoints.steps()):
        try:
            return run.checkpoints.metadata(step)["data"]
        except DamagedError as error:
            logging.warning("%s", error)
    return run.stream.state(0)


def attempts(
    step: int, state: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[Attempt]:
    """The times that a step was taken, the last one last.

    Args:
      step: from 1.
      state: `data_state` of the run.
      rows: of its `metrics.jsonl`. A rewind whose skip was lost to a kill before the next
        checkpoint has no part in the order of the data.
    """
    skips = [(int(at), int(rows)) for at, rows in state["skips"]]
    rewinds = []
    unrecorded = collections.Counter()
    for row in rows:
        if row.get("event") == "resumed":
            unrecorded.clear()
        elif row.get("event") == "rewound":
            skip = (row["step"], row["skipped_rows"])
            rewinds.append((skip, row["from_step"]))
            unrecorded[skip] += 1
    skips += (unrecorded - collections.Counter(skips)).elements()
    found = [Attempt(tuple(sorted(skips)), step - 1)]
    for skip, from_step in reversed(rewinds):
        if skip not in skips:
            continue
        skips.remove(skip)
        if skip[0] < step <= from_step:
            found.insert(0, Attempt(tuple(sorted(skips)), min(skip[0], found[0].last_checkpoint)))
    return found


def weights_before(run: Run, last: int) -> tuple[Tree, int, str]:
    """(weights, steps done, where they are from) of the last sound checkpoint up to `last`."""
    for step in reversed([s for s in run.checkpoints.steps() if s <= last]):
        path = run.checkpoints.directory / str(step)
        try:
            weights, _ = open_checkpoint(path, run.layout)
            return weights, step, str(path)
        except DamagedError as error:
            logging.warning("%s", error)
    return run.new_state().params, 0, "initial weights"


def token_losses(run: Run, weights: Tree, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Nats [B, T] of each target, computed as in training; NaN also where there is none."""
    whole = dataclasses.replace(run.gradient, num_micro_batches=1)
    evaluate = make_eval_step(PerToken(), run.layout, whole)
    num_rows = len(batch["ids"])
    chunk = max(1, num_rows // run.gradient.num_micro_batches)
    losses = []
    for start in range(0, num_rows, chunk):
        part = {name: x[start : start + chunk] for name, x in batch.items()}
        term = evaluate(weights, jax.device_put(part, run.rows))["loss"]
        losses.append(np.where(part["weights"] > 0, np.asarray(term.sum), np.nan))
    return np.concatenate(losses)


def replay(
    run: Run,
    step: int,
    *,
    row: int | None = None,
    attempt: int | None = None,
    checkpoint: str | None = None,
    num_worst: int = 20,
) -> dict[str, Any]:
    """What `--format=json` prints: the batch of a step, row by row, with the loss of each token.

    Args:
      run: as its program assembles it.
      step: from 1.
      row: of the batch, to list alone; `loss` is the whole batch's all the same.
      attempt: from 1, where the step was taken more than once; the last by default.
      checkpoint: to take weights from; see above.
      num_worst: how many tokens of the highest loss are listed.

    Raises:
      ConfigError: there is no such step, attempt or row, or no such checkpoint.
    """
    if not 1 <= step <= run.num_steps:
        raise ConfigError(f"--step={step} is none of the run's; give 1 to {run.num_steps}")
    if not isinstance(run.stream, Batches):
        raise ConfigError("only a run on packed text can be replayed")
    path = run.workdir / "metrics.jsonl"
    rows = metrics_lib.read(path) if path.exists() else []
    with input_errors():
        state = data_state(run)
        taken = attempts(step, state, rows)
        number = len(taken) if attempt is None else attempt
        if not 1 <= number <= len(taken):
            raise ConfigError(
                f"--attempt={attempt}: step {step} was taken {len(taken)} times; give 1 to "
                f"{len(taken)}"
            )
        chosen = taken[number - 1]
        stream = run.stream.resume({**state, "skips": [list(skip) for skip in chosen.skips]})
        batch = stream.host_batch(step - 1)
        num_rows = len(batch["ids"])
        if row is not None and not 0 <= row < num_rows:
            raise ConfigError(f"--row={row}: the batch of step {step} has 0 to {num_rows - 1}")
        if checkpoint is None:
            weights, done, source = weights_before(run, chosen.last_checkpoint)
        else:
            (weights, config), done, source = (
                open_checkpoint(checkpoint, run.layout),
                None,
                checkpoint,
            )
            if config != run.model:
                raise ConfigError(f"the model in {checkpoint} is another than this run's")
    losses = token_losses(run, weights, batch)
    wanted = list(range(num_rows)) if row is None else [row]
    return {
        "step": step,
        "attempt": number,
        "num_attempts": len(taken),
        "weights": {"steps_done": done, "source": source},
        "loss": _mean(losses, batch["weights"] > 0),
        "recorded": recorded(step, rows, is_last=number == len(taken)),
        "rows": describe_rows(run, stream, step, batch, losses, wanted),
        "worst": worst_tokens(run, batch, losses, wanted, num_worst),
    }


def recorded(step: int, rows: Sequence[Mapping[str, Any]], is_last: bool) -> dict[str, Any]:
    """What `metrics.jsonl` says of a step: its row, if it has one, and every time it was skipped.

    Only the last attempt has a row; those before it were cut off by the rewind.
    """
    names = ("loss", "grad_norm", "learning_rate", "skipped")
    of_step = [row for row in rows if row.get("step") == step]
    row = next((row for row in of_step if "loss" in row and "event" not in row), {})
    skipped = [row for row in of_step if row.get("event") == "skipped"]
    return {name: row[name] for name in names if is_last and name in row} | {
        "times_skipped": [{n: row[n] for n in ("loss", "grad_norm") if n in row} for row in skipped]
    }


def describe_rows(
    run: Run,
    stream: Batches,
    step: int,
    batch: Mapping[str, np.ndarray],
    losses: np.ndarray,
    wanted: Sequence[int],
) -> list[dict[str, Any]]:
    """For each row where it is from, and its pieces of documents with their text and losses."""
    sources, plan_rows = stream.rows(step - 1)
    described = []
    for r in wanted:
        packed, plan_row, at, pieces = stream.sources[sources[r]], int(plan_rows[r]), 0, []
        for document, start, length in packed.row(plan_row)[1].tolist():
            to = at + length
            ids = [int(batch["ids"][r, at]), *batch["targets"][r, at:to].tolist()]
            pieces.append({
                "document": document,
                "first_token": start,
                "position": at,
                "loss": _mean(losses[r, at:to], batch["weights"][r, at:to] > 0),
                "text": run.tokenizer.decode(ids, skip_special=False, continuation=start > 0),
                "token_ids": ids,
                "losses": losses[r, at:to].tolist(),
            })  # fmt: skip
            at = to
        described.append({
            "row": r,
            "source": packed.name,
            "plan_row": plan_row,
            "num_tokens": at,
            "loss": _mean(losses[r], batch["weights"][r] > 0),
            "documents": pieces,
        })  # fmt: skip
    return described


def worst_tokens(
    run: Run,
    batch: Mapping[str, np.ndarray],
    losses: np.ndarray,
    wanted: Sequence[int],
    num: int,
) -> list[dict[str, Any]]:
    """The targets of the highest loss, not finite ones first, with what is before them."""
    counts = (batch["weights"] > 0) & np.isin(np.arange(len(losses)), wanted)[:, None]
    rows, positions = np.nonzero(counts)
    values = losses[rows, positions]
    order = np.argsort(-np.nan_to_num(values, nan=np.inf), kind="stable")[:num]
    found = []
    for r, t in zip(rows[order].tolist(), positions[order].tolist(), strict=True):
        start = max(t - CONTEXT + 1, t - int(batch["positions"][r, t]))
        target = int(batch["targets"][r, t])
        found.append({
            "row": r,
            "position": t,
            "loss": float(losses[r, t]),
            "token_id": target,
            "token": text_of(run, [target]),
            "before": text_of(run, batch["ids"][r, start : t + 1].tolist()),
        })  # fmt: skip
    return found


def text_of(run: Run, ids: Sequence[int]) -> str:
    return run.tokenizer.decode(ids, skip_special=False, continuation=True)


def _mean(losses: np.ndarray, counts: np.ndarray) -> float:
    """The mean over the targets that count; NaN if one of them is."""
    return float(np.mean(losses[counts], dtype=np.float64)) if counts.any() else math.nan
