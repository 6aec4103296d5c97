"""Write the report of a study.

python -m studies.outcome.report results/mine
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from studies.cli import run_command
from studies.outcome.report.page import write


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html into a study's folder: one self-contained file, which needs no network."""

    folder: tyro.conf.Positional[Path]
    """The study's folder, for example results/mine."""


def main(settings: Report) -> None:
    """Write the report and print its path."""
    print(write(settings.folder))


if __name__ == "__main__":
    run_command(main, Report)
