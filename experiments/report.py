"""Writes the page about a training run, see `lm.run.report`.

    python -m experiments.report --workdir=W  # W/report.html from W/{config,metrics,summary} files

Figures need matplotlib: `pip install 'lm-lifecycle[report]'`.
"""

from absl import flags

from lm.config import program
from lm.config.command_line import ConfigError
from lm.run import report


def main() -> None:
    try:
        print(report.write_from_workdir(flags.FLAGS.workdir))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    program.run(main)
