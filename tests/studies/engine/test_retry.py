import re
import time

import pytest

from studies.engine.retry import StorageLostError, retry


class Storage:
    """A storage that fails until its use number `back_at`."""

    def __init__(self, back_at: int, error: Exception) -> None:
        self.uses = 0
        self._back_at = back_at
        self._error = error

    def use(self) -> str:
        self.uses += 1
        if self.uses < self._back_at:
            raise self._error
        return "used"


def test_storage_that_is_there_is_used_at_once(caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    assert retry(Storage(1, OSError()).use, "the storage") == "used"
    assert time.monotonic() - began < 0.1
    assert caplog.messages == []


def test_storage_that_comes_back_is_waited_for_and_said_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = Storage(4, OSError(28, "No space left on device"))
    began = time.monotonic()
    assert retry(storage.use, "the storage") == "used"
    # The waits between the four uses are 0.2, 0.4 and 0.8 seconds.
    assert 1.4 <= time.monotonic() - began < 10
    assert storage.uses == 4
    gone, back = caplog.messages
    assert gone == "the storage cannot be used ([Errno 28] No space left on device); waiting for it"
    assert re.fullmatch(r"the storage is back after \d s", back)


def test_storage_that_stays_away_is_given_up_with_the_remedy() -> None:
    storage = Storage(99, OSError("it is gone\nand more of it"))
    with pytest.raises(StorageLostError) as lost:
        retry(storage.use, "the storage", patience=0.5)
    assert str(lost.value) == (
        "the storage cannot be used for 0 s: it is gone. Fix the cause and --resume: nothing "
        "that was recorded is lost."
    )
    assert isinstance(lost.value.__cause__, OSError)


def test_error_without_words_is_named_by_its_kind() -> None:
    with pytest.raises(StorageLostError, match="for 0 s: TimeoutError"):
        retry(Storage(2, TimeoutError()).use, "the storage", patience=0)


def test_other_errors_are_not_waited_for() -> None:
    storage = Storage(2, KeyError("wrong"))
    with pytest.raises(KeyError):
        retry(storage.use, "the storage")
    assert storage.uses == 1
    assert retry(Storage(2, KeyError()).use, "the storage", (KeyError,)) == "used"


def test_lost_storage_is_not_taken_for_the_failure_of_a_trial() -> None:
    assert not issubclass(StorageLostError, Exception)
