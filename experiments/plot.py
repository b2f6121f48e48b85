"""Compares runs on one page: curves overlaid, final figures, what differs; see `lm.run.report`.

    python -m experiments.plot runs/a runs/b --output=compare.html
    python -m experiments.plot runs/* --metric=loss --metric=grad_norm --x=time --smooth=0.95

Each run is the workdir of `experiments.pretrain`; one still going may be compared too. Where a run
was resumed, rewound, or skipped a step, its curves are marked.
"""

from collections.abc import Sequence

from absl import flags

from lm.config import program
from lm.config.command_line import ConfigError
from lm.config.fields import BelowOne
from lm.config.program import Number
from lm.run import report


def main(workdirs: Sequence[str]) -> None:
    values, runs = flags.FLAGS, []
    try:
        runs = report.load(workdirs)
        print(report.write(
            values.output, runs, metrics=values.metric, smooth=values.smooth, x=values.x
        ))  # fmt: skip
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    flags.DEFINE_string("output", "compare.html", "The page to write.")
    flags.DEFINE_multi_string("metric", [], "What to draw; may be repeated. Default: the usual.")
    flags.DEFINE(
        Number(BelowOne), "smooth", 0.8, "Weight of a neighbour in the smoothed line; 0 for none."
    )
    flags.DEFINE_enum("x", "step", list(report.X_LABELS), "The x axis.")
    program.run(main, positional=True)
