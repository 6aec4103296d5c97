"""Errors that a user can mend, each naming the value that was wrong and the remedy.

All derive from :class:`BatchCamError`, so that a command line can print them without a traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class BatchCamError(ValueError):
    """Something the user gave cannot be used."""


class ConfigError(BatchCamError):
    """A field of a configuration has a value that cannot work."""


class DataError(BatchCamError):
    """A data set is missing, damaged or unusable."""


class BackboneError(BatchCamError):
    """A backbone is unknown, or cannot be explained by a CAM at this resolution."""


class BundleError(BatchCamError):
    """A bundle is incomplete, or does not match what it claims."""


class DivergedError(BatchCamError):
    """Training produced a loss that is not finite."""


def suggest_names(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return ``" Did you mean a, b?"`` for the names nearest to `name`, or an empty string."""
    near = get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return f" Did you mean {', '.join(near)}?" if near else ""
