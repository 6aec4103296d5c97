"""The packages that a plain installation leaves out, by the extra that installs them.

`pyproject.toml` lists the packages of each extra. Modules that need an extra import its packages
where they use them, under :func:`require_extra`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from batchcam.errors import BatchCamError

_OWN = ("batchcam", "studies", "cluster")


class MissingPackageError(BatchCamError):
    """A package is not installed."""


@contextmanager
def require_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn a failed import in the context into an error that names the extra.

    Args:
        extra: the extra of `pyproject.toml` that installs the packages imported in the context.
        purpose: what needs them; the subject of the message.

    Raises:
        MissingPackageError: a package is not installed.

    Example:
        >>> with require_extra("onnx", "model.onnx"):
        ...     import absent_package
        Traceback (most recent call last):
        batchcam.extras.MissingPackageError: model.onnx needs the package absent_package, which ...
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in _OWN:
            raise
        raise MissingPackageError(
            f"{purpose} needs the package {package}, which is not installed; run pip install "
            f"'.[{extra}]' in a checkout of batchcam."
        ) from error
