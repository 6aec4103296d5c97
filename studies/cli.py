"""How the commands of this package begin and end."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from batchcam.errors import BatchCamError

Settings = TypeVar("Settings")


def run_command(main: Callable[[Settings], None], settings: type[Settings]) -> None:
    """Call `main` with what the command line says; exit with 2 where the user can mend an error."""
    try:
        main(tyro.cli(settings))
    except BatchCamError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
