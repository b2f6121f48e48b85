"""Rebuild the batch of a step of a run, and show which of its tokens the model did worst on.

    python -m experiments.replay --workdir=runs/demo --step=153
    python -m experiments.replay --workdir=runs/demo --step=153 --row=7
    python -m experiments.replay --workdir=runs/demo --step=153 --format=json > step153.json

Steps are counted as in `metrics.jsonl`: step 1 is the first. The batch is the one that was trained
on, through changes of the batch size or mixture and through rewinds; where training went back and
took the step again with other data, `--attempt=1` is the batch of the first time. Losses are those
of the weights before the step, as far as a checkpoint has them: of the nearest at or before it, of
the initial weights before the first, or of `--checkpoint=PATH`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments.pretrain import open_run
from lm.config import program
from lm.config.fields import Count, Whole
from lm.config.program import Number
from lm.run.metrics import to_json
from lm.run.parts import Run
from lm.run.replay import replay, text_of


def to_text(found: Mapping[str, Any]) -> str:
    """A summary: where each row is from, and the worst tokens."""
    weights, known = found["weights"], found["recorded"]
    times = f", attempt {found['attempt']} of {found['num_attempts']}"
    done = "" if weights["steps_done"] is None else f" ({weights['steps_done']} steps done)"
    lines = [
        f"step {found['step']}{times if found['num_attempts'] > 1 else ''}",
        f"loss {found['loss']:.4f} of {weights['source']}{done}",
    ]
    figures = [f"{name} {value:.4g}" for name, value in known.items() if name != "times_skipped"]
    lines += [f"recorded: {', '.join(figures)}"] if figures else []
    for each in known["times_skipped"]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in each.items())
        lines.append(f"recorded as skipped: {figures}")
    lines += ["", " row    loss  source, plan row: documents"]
    for each in found["rows"]:
        documents = " ".join(str(piece["document"]) for piece in each["documents"])
        where = f"{each['source']}, {each['plan_row']}: {documents}"
        lines.append(f"{each['row']:4d}  {each['loss']:6.3f}  {where}")
    lines += ["", "   loss  row:position  token, after"]
    for each in found["worst"]:
        where = f"{each['row']}:{each['position']}"
        lines.append(
            f"{each['loss']:7.3f}  {where:>12}  {each['token']!r}, after {each['before']!r}"
        )
    return "\n".join(lines)


def row_to_text(run: Run, described: Mapping[str, Any]) -> str:
    """Every token of a row, with its loss."""
    lines = []
    for piece in described["documents"]:
        lines += ["", f"document {piece['document']} of {described['source']}, from token "
                  f"{piece['first_token']} on, loss {piece['loss']:.3f}"]  # fmt: skip
        lines.append(f"{piece['position']:4d}          {text_of(run, piece['token_ids'][:1])!r}")
        for i, (token, loss) in enumerate(
            zip(piece["token_ids"][1:], piece["losses"], strict=True)
        ):
            lines.append(f"{piece['position'] + i:4d}  {loss:7.3f} {text_of(run, [token])!r}")
    return "\n".join(lines)


def main() -> None:
    values = flags.FLAGS
    run = open_run(values.workdir)
    found = replay(
        run, values.step, row=values.row, attempt=values.attempt,
        checkpoint=values.checkpoint, num_worst=values.worst,
    )  # fmt: skip
    if values.format == "json":
        print(json.dumps(to_json(found)))
        return
    print(to_text(found))
    if values.row is not None:
        print(row_to_text(run, found["rows"][0]))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE(Number(Count), "step", None, "Step to rebuild, from 1.", required=True)
    flags.DEFINE(Number(Whole), "row", None, "Show this row of the batch alone, token by token.")
    flags.DEFINE(Number(Count), "attempt", None, "Which time the step was taken, from 1; the last.")
    flags.DEFINE_string("checkpoint", None, "Take the weights from this checkpoint.")
    flags.DEFINE(Number(Whole), "worst", 20, "How many tokens of the highest loss to list.")
    flags.DEFINE_enum("format", "text", ["text", "json"], "For people, or for programs.")
    program.run(main)
