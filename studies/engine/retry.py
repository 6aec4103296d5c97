"""Storage that is gone for a while: wait for it, and say so; give up with what to do."""

import time
from collections.abc import Callable
from typing import TypeVar

from studies.monitoring.console import console

PATIENCE_SECONDS = 120.0
"""How long a study waits for its storage before it stops, to be resumed."""

_FIRST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 5.0

T = TypeVar("T")


class StorageLostError(BaseException):
    """What a study must write could not be written in `PATIENCE_SECONDS`.

    No Exception, for Ray takes those that arise while it ends a trial for failures of the trial,
    and would go on without a ledger.
    """


def retry(
    action: Callable[[], T],
    what: str,
    errors: tuple[type[Exception], ...] = (OSError,),
    patience: float | None = None,
) -> T:
    """Return what `action` returns, trying again while it raises one of `errors`.

    Args:
        action: must be safe to repeat after it failed halfway.
        what: names the storage, in the words of "… cannot be used".
        errors: those that may pass.
        patience: seconds until it gives up; by default `PATIENCE_SECONDS`.

    Raises:
        StorageLostError: it did not come back in time.
    """
    began = time.monotonic()
    patience = PATIENCE_SECONDS if patience is None else patience
    wait = _FIRST_WAIT_SECONDS
    told = False
    while True:
        try:
            result = action()
        except errors as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if time.monotonic() - began >= patience:
                raise StorageLostError(
                    f"{what} cannot be used for {patience:.0f} s: {reason}. Mend it and --resume: "
                    "nothing that was recorded is lost."
                ) from error
            if not told:
                console.print(f"{what} cannot be used ({reason}); waiting for it")
                told = True
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
        else:
            if told:
                console.print(f"{what} is back after {time.monotonic() - began:.0f} s")
            return result
