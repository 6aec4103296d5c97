"""The command line of studies: `batchcam-study run | report | compare | dashboard | view`.

Errors that a user can correct are printed without a traceback, and the exit status is 2. Each
command imports what it needs when it runs, so that help is fast, and a missing extra is named.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from batchcam.errors import exit_on_error
from batchcam.extras import require_extra

_PROGRAM = "batchcam-study"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run or resume a study; `batchcam-study run --help` lists its flags."""

    def run(self) -> None:
        """Never called: :func:`main` hands the flags to :func:`run_study`."""
        raise AssertionError("the flags of run are parsed by studies.study")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html into a study's folder: one self-contained file, which needs no network."""

    folder: tyro.conf.Positional[Path]
    """The study's folder, for example results/mine."""

    def run(self) -> None:
        """Write the report, and print its path."""
        with require_extra("report", "the report"):
            from studies.outcome.report.page import write

        print(write(self.folder))


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Show several studies side by side, from what they exported."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """The studies' folders, for example results/one results/other."""
    out: Path | None = None
    """A Markdown file to write the tables to."""

    def run(self) -> None:
        """Print the tables, and write them to a file if one is given."""
        with require_extra("studies", "compare"):
            from studies.outcome.compare import compare

        compare(self.folders, self.out)


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """Create the W&B workspace of a study; needs W&B's server and a key, or --offline."""

    folder: tyro.conf.Positional[Path]
    """The study's folder, for example results/mine."""
    offline: bool = False
    """Write dashboard.json into the folder instead, without any connection."""

    def run(self) -> None:
        """Publish or write the workspace, and print its address or path."""
        with require_extra("studies", "the dashboard"):
            from studies.monitoring.wandb_workspace import create

        print(create(self.folder, offline=self.offline))


@dataclass(frozen=True, kw_only=True)
class View:
    """Serve Optuna Dashboard on a study with the trials' class CAMs, until Ctrl-C."""

    folder: tyro.conf.Positional[Path]
    """The study's folder, for example results/mine."""
    port: int = 8080
    """Port on 127.0.0.1."""

    def run(self) -> None:
        """Serve the study."""
        with require_extra("studies", "view"):
            from studies.monitoring.optuna_dashboard import serve

        serve(self.folder, self.port)


Command = Run | Report | Compare | Dashboard | View


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, and exit with status 2 for an error that the user can correct."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"]:
        run_study(arguments[1:], program=f"{_PROGRAM} run")
        return
    with exit_on_error():
        _parse(arguments).run()


def run_study(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run a study from a command line; exit with status 2 after an error, a missing extra included.

    Args:
        argv: the arguments; None: those of this process.
        program: the name of the program in its help; None: that of this process.
    """
    with exit_on_error(), require_extra("studies", "a study"):
        from studies.study import main as run
    run(argv, program)


def _parse(arguments: list[str]) -> Command:
    commands: Any = (
        Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Dashboard, tyro.conf.subcommand("dashboard")]
        | Annotated[View, tyro.conf.subcommand("view")]
    )
    command: Command = tyro.cli(
        commands, args=arguments, prog=_PROGRAM, description=__doc__.splitlines()[0]
    )
    return command
