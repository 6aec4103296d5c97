"""The command line: `batchcam train | evaluate | compare | explain | verify | export`.

Errors that a user can correct are printed without a traceback, and the exit status is 2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from batchcam.cli.commands import Compare, Evaluate, Explain, Export, Train, Verify
from batchcam.config import TrialConfig
from batchcam.errors import exit_on_error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with exit_on_error():
        sys.exit(_parse(arguments).run())


def _parse(arguments: list[str]) -> Train | Evaluate | Compare | Explain | Verify | Export:
    """Parse the command line; `train --config FILE` replaces the defaults of the other flags."""
    train: Any = Annotated[Train, tyro.conf.subcommand("train")]
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    found, _ = finder.parse_known_args(arguments)
    if arguments[:1] == ["train"] and found.config is not None:
        default = Train(trial=TrialConfig.from_yaml(found.config), out=tyro.MISSING)
        train = Annotated[Train, tyro.conf.subcommand("train", default=default)]
    commands: Any = (
        train
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Explain, tyro.conf.subcommand("explain")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[Export, tyro.conf.subcommand("export")]
    )
    command: Train | Evaluate | Compare | Explain | Verify | Export = tyro.cli(
        commands, args=arguments, prog="batchcam", description=__doc__.splitlines()[0]
    )
    return command
