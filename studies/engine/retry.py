"""Retry an action on storage that does not answer, until it answers or a time limit.

Both ends of a wait are logged as warnings. A program that has not set up logging prints them.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from batchcam.errors import first_line

log = logging.getLogger(__name__)

RETRY_SECONDS = 120.0
"""How long a study waits for its storage before it stops, to be resumed."""

_FIRST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 5.0

T = TypeVar("T")


class StorageLostError(BaseException):
    """Storage that a study needs could not be used for `RETRY_SECONDS`.

    Not an Exception: Ray takes an Exception that is raised while it ends a trial for a failure of
    the trial, and would continue without a ledger.
    """


def retry(
    action: Callable[[], T],
    what: str,
    errors: tuple[type[Exception], ...] = (OSError,),
    patience: float | None = None,
) -> T:
    """Return what `action` returns, repeating it while it raises one of `errors`.

    Args:
        action: must be safe to repeat after it failed halfway.
        what: the name of the storage in messages.
        errors: the errors that may pass.
        patience: seconds until it gives up; by default `RETRY_SECONDS`.

    Raises:
        StorageLostError: the errors lasted longer than `patience`.

    Example:
        >>> retry(lambda: "content", "the shared folder")
        'content'
    """
    began = time.monotonic()
    patience = RETRY_SECONDS if patience is None else patience
    wait = _FIRST_WAIT_SECONDS
    waited = False
    while True:
        try:
            result = action()
        except errors as error:
            reason = first_line(error)
            if time.monotonic() - began >= patience:
                raise StorageLostError(
                    f"{what} cannot be used for {patience:.0f} s: {reason}. Fix the cause and "
                    "--resume: nothing that was recorded is lost."
                ) from error
            if not waited:
                log.warning("%s cannot be used (%s); waiting for it", what, reason)
                waited = True
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
        else:
            if waited:
                log.warning("%s is back after %.0f s", what, time.monotonic() - began)
            return result


def retry_in_trial(action: Callable[[], T], what: str) -> T:
    """Return what `action` returns, as :func:`retry`, in a process that runs a trial.

    Raises:
        OSError: the storage could not be used for `RETRY_SECONDS`. The trial fails, and its
            process can run the next one.
    """
    try:
        return retry(action, what)
    except StorageLostError as error:
        raise OSError(str(error)) from error
