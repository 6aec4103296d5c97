"""What all commands of this package share: errors in one line, exit status 2."""

from collections.abc import Callable
from typing import TypeVar

import tyro

from batchcam.errors import exit_on_error

Settings = TypeVar("Settings")


def run_command(main: Callable[[Settings], None], settings: type[Settings]) -> None:
    """Parse the command line as `settings`, and call `main` with the result.

    Exits with status 2 and one line for an error that the user can correct.
    """
    with exit_on_error():
        main(tyro.cli(settings))
