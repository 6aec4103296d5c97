"""Errors that a user can correct. Each message names the wrong value and the remedy.

All derive from :class:`BatchCamError`, so that a command line can print them without a traceback.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class BatchCamError(ValueError):
    """An input of the user cannot be used."""


class ConfigError(BatchCamError):
    """A configuration has an invalid value."""


class DataError(BatchCamError):
    """A data set is missing, damaged or unusable."""


class BackboneError(BatchCamError):
    """A backbone is unknown, or cannot be explained by a CAM at this resolution."""


class BundleError(BatchCamError):
    """A bundle is incomplete, or does not match what it claims."""


class DivergedError(BatchCamError):
    """Training produced a loss that is not finite."""


class FormatError(BatchCamError):
    """A file was written by a newer version of this project."""


def check_format(path: Path, found: object, known: int) -> None:
    """Refuse a file whose format is newer than the newest one that this version reads.

    Args:
        path: the file, for the message.
        found: the `format` that the file names; None in files that are older than such numbers.
        known: the newest format that the calling reader knows.

    Raises:
        FormatError: `found` is no integer from 1 to `known`.

    Example:
        >>> check_format(Path("ledger.jsonl"), found=1, known=1)
        >>> check_format(Path("ledger.jsonl"), found=2, known=1)
        Traceback (most recent call last):
        batchcam.errors.FormatError: ledger.jsonl has the format 2, but this version of batchcam ...
    """
    if found is None or (isinstance(found, int) and 1 <= found <= known):
        return
    raise FormatError(
        f"{path} has the format {found!r}, but this version of batchcam reads formats up to "
        f"{known}; upgrade batchcam to the version that wrote the file, or a later one."
    )


@contextmanager
def exit_on_error(*more: type[BaseException]) -> Iterator[None]:
    """Print an error that a user can correct in one line on stderr, and exit with status 2.

    Args:
        more: further classes of errors that a user can correct.

    Example:
        >>> with exit_on_error(FileNotFoundError):  # Prints "error: no such file" on stderr.
        ...     raise FileNotFoundError("no such file")
        Traceback (most recent call last):
        SystemExit: 2
    """
    correctable: tuple[type[BaseException], ...] = (BatchCamError, *more)
    try:
        yield
    except correctable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def suggest_names(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return ``" Did you mean a, b?"`` with the nearest known names, or an empty string.

    Example:
        >>> suggest_names("resnet81", ["resnet18", "simple_cnn"])
        ' Did you mean resnet18?'
    """
    near = get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return f" Did you mean {', '.join(near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters.

    The name of its class replaces an empty message, as MemoryError often has.

    Example:
        >>> first_line(MemoryError())
        'MemoryError'
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
