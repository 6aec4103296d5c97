"""Check the progress of a search and the warnings of the engine on the terminal."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from studies.benchmarks.dummy import DummyStudy
from studies.engine.ledger import Ledger
from studies.engine.retry import retry
from studies.monitoring.console import TrialLines
from studies.monitoring.progress import on_terminal, print_engine_warnings


@pytest.fixture
def _engine_log() -> Iterator[None]:
    """Remove the handlers of the engine's log, and restore them after the test."""
    log = logging.getLogger("studies.engine")
    before = list(log.handlers)
    log.handlers.clear()
    yield
    log.handlers[:] = before


@pytest.mark.usefixtures("_engine_log")
def test_storage_that_is_away_is_said_on_the_terminal_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    uses: list[object] = []

    def use() -> None:
        uses.append(None)
        if len(uses) < 2:
            raise OSError(28, "No space left on device")

    for _ in range(2):
        print_engine_warnings()
    retry(use, "the [storage]")
    gone, back = capsys.readouterr().out.splitlines()
    assert gone.startswith("the [storage] cannot be used ([Errno 28] No space left on device); ")
    assert back == "the [storage] is back after 0 s"


def test_lines_go_on_from_what_had_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(2):
        ledger.propose({"number": number, "trial_id": f"k_{number:05d}"})
    ledger.end(0, "failed")
    with on_terminal(DummyStudy(out=tmp_path).search())(ledger, 3) as callbacks:
        (lines,) = callbacks
        assert isinstance(lines, TrialLines)
        assert vars(lines) == {"_ledger": ledger, "_num_trials": 3, "_ended": 1}
    assert capsys.readouterr().out == ""  # No table without a terminal.
