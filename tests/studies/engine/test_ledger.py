import json
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchcam.errors import ConfigError, FormatError
from studies.engine import retry as patience
from studies.engine.ledger import FORMAT, Ledger
from studies.engine.retry import StorageLostError


def params(number: int) -> dict[str, Any]:
    return {"number": number, "trial_id": f"k_{number:05d}", "x": 0.1 * number}


def metrics(epoch: int) -> dict[str, float]:
    return {"epoch": epoch, "val_accuracy": 1 - 1 / (epoch + 1)}


EVENTS: list[Callable[[Ledger], object]] = [
    lambda ledger: ledger.propose(params(0)),
    lambda ledger: ledger.propose(params(1)),
    lambda ledger: ledger.report(1, metrics(1)),
    lambda ledger: ledger.report(0, metrics(1)),
    lambda ledger: ledger.enlarge(1, 2),
    lambda ledger: ledger.end(0, "failed", 'it said:\n"no" — φ'),
    lambda ledger: ledger.propose(params(2)),
    lambda ledger: ledger.report(1, metrics(2)),
    lambda ledger: ledger.end(1, "stopped"),
]
"""The events of a study of three trials; the last trial has only started."""


def record(path: Path, count: int = len(EVENTS)) -> Ledger:
    ledger = Ledger(path)
    for event in EVENTS[:count]:
        event(ledger)
    return ledger


def content(ledger: Ledger) -> tuple[Any, ...]:
    return ledger.trials, list(ledger.reports)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_ledger_that_is_opened_again_is_the_same(path: Path) -> None:
    written = record(path)
    assert content(Ledger(path)) == content(written)
    failed, stopped, begun = written.trials
    assert (failed.state, failed.error, failed.epoch) == ("failed", 'it said:\n"no" — φ', 1)
    assert (stopped.state, stopped.error, stopped.epoch) == ("stopped", None, 2)
    assert (failed.resource_multiplier, stopped.resource_multiplier) == (1, 2)
    assert (begun.state, begun.epoch, begun.params) == (None, 0, params(2))
    assert written.get(2) is begun
    assert written.get(3) is None


def test_reports_come_in_the_order_of_their_arrival(path: Path) -> None:
    record(path)
    assert list(Ledger(path).reports) == [(1, metrics(1)), (0, metrics(1)), (1, metrics(2))]


def test_trials_come_in_the_order_of_their_numbers(path: Path) -> None:
    ledger = Ledger(path)
    for number in (2, 0, 1):
        ledger.propose(params(number))
    assert [trial.number for trial in Ledger(path).trials] == [0, 1, 2]


def test_event_that_is_told_twice_is_recorded_once(path: Path) -> None:
    ledger = record(path)
    before = path.read_bytes()
    ledger.propose(params(1) | {"x": "another"})
    assert ledger.report(1, metrics(2) | {"val_accuracy": 0.0}) is False
    assert ledger.report(1, metrics(1)) is False
    ledger.end(1, "completed")
    assert path.read_bytes() == before


def test_every_event_is_in_the_file_before_it_is_believed(path: Path) -> None:
    ledger = Ledger(path)
    for count, event in enumerate(EVENTS, start=1):
        event(ledger)
        assert len(path.read_bytes().splitlines()) == count
        assert content(Ledger(path)) == content(ledger)


def test_number_that_is_none_is_kept(path: Path) -> None:
    ledger = record(path, count=1)
    ledger.report(0, {"epoch": 1, "val_accuracy": float("nan"), "loss": float("inf")})
    (trial,) = Ledger(path).trials
    assert str(trial.reports) == "[{'epoch': 1, 'val_accuracy': nan, 'loss': inf}]"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Any]]:
    """Return the ledger file of a study, and the content of the ledger after each event."""
    folder = tmp_path_factory.mktemp("whole")
    states = [content(record(folder / str(count), count)) for count in range(len(EVENTS) + 1)]
    return (folder / str(len(EVENTS))).read_bytes(), states


@given(data=st.data())
def test_file_that_is_cut_anywhere_holds_what_came_before(
    whole: tuple[bytes, list[Any]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    text, states = whole
    cut = data.draw(st.integers(0, len(text)))
    path = tmp_path_factory.mktemp("cut") / "ledger.jsonl"
    path.write_bytes(text[:cut])
    ledger = Ledger(path)
    done = text[:cut].count(b"\n")
    assert content(ledger) == states[done]
    # The ledger continues as if the file had not been cut.
    for event in EVENTS[done:]:
        event(ledger)
    assert path.read_bytes() == text


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b'{"number":0}',
        b'{"event":"unknown","number":0}',
        b'{"event":"ended","number":99,"state":"failed","error":null}',
        b"\x00\x00\xff",
    ],
)
def test_damage_before_the_last_line_is_named(path: Path, line: bytes) -> None:
    record(path)
    lines = path.read_bytes().split(b"\n")
    lines[3] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ConfigError, match=r"line 4 of .*ledger\.jsonl is no event .*backup"):
        Ledger(path)


def test_full_disk_is_waited_for_and_leaves_no_half_lines(
    path: Path, whole: tuple[bytes, list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    ledger = record(path, count=4)
    # Simulates a full disk: a limit on file sizes leaves room for only a part of the next line.
    room, unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.stat().st_size + 10

    def make_room() -> None:
        for _ in range(1000):
            if path.stat().st_size == size:
                break
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited))

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited))
    friend = threading.Thread(target=make_room)
    friend.start()
    try:
        for event in EVENTS[4:]:
            event(ledger)
    finally:
        friend.join()
    assert path.read_bytes() == whole[0]
    assert "ledger.jsonl cannot be used" in caplog.text


def test_line_that_may_not_be_on_the_disk_is_written_once(
    path: Path, whole: tuple[bytes, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, []

    def fail_at_first(number: int) -> None:
        calls.append(number)
        if len(calls) % 3:
            raise OSError(5, "Input/output error")
        fsync(number)

    monkeypatch.setattr(os, "fsync", fail_at_first)
    monkeypatch.setattr(patience, "_FIRST_WAIT_SECONDS", 0.001)
    record(path)
    assert len(calls) == 3 * len(EVENTS)
    assert path.read_bytes() == whole[0]


def test_disk_that_stays_full_ends_the_study_and_loses_nothing(
    path: Path, whole: tuple[bytes, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = record(path, count=4)
    monkeypatch.setattr(patience, "RETRY_SECONDS", 0.3)
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, room[1]))
    try:
        with pytest.raises(StorageLostError, match=r"ledger\.jsonl cannot be used .*--resume"):
            EVENTS[4](ledger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    assert content(ledger) == whole[1][4]
    again = Ledger(path)
    assert content(again) == whole[1][4]
    for event in EVENTS[4:]:
        event(again)
    assert path.read_bytes() == whole[0]


def test_first_line_names_the_format(path: Path) -> None:
    record(path)
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["format"] == FORMAT
    assert all("format" not in event for event in others)


def test_file_of_before_there_were_formats_is_continued(path: Path) -> None:
    whole = record(path)
    old = path.read_text().replace('"format":1,', "")
    lines = old.splitlines(keepends=True)
    path.write_text("".join(lines[:5]))
    ledger = Ledger(path)
    for event in EVENTS[5:]:
        event(ledger)
    assert path.read_text() == old
    assert content(ledger) == content(Ledger(path)) == content(whole)


@pytest.mark.parametrize("newer", [FORMAT + 1, "2"])
def test_newer_format_is_refused_with_the_remedy(path: Path, newer: int | str) -> None:
    record(path)
    with path.open("a") as file:
        file.write(json.dumps({"format": newer, "event": "split", "number": 0}) + "\n")
    before = path.read_bytes()
    with pytest.raises(FormatError, match=r"ledger\.jsonl has the format .*up to 1; upgrade"):
        Ledger(path)
    assert path.read_bytes() == before


def test_lines_can_be_read_by_anyone(path: Path) -> None:
    record(path)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["event"] for event in events[:3]] == ["proposed", "proposed", "report"]
    assert events[2] == {"event": "report", "number": 1, "metrics": metrics(1)}


def test_trials_that_are_tried_again_are_not_final(path: Path) -> None:
    ledger = Ledger(path)
    for number in range(5):
        ledger.propose(params(number))
    assert ledger.num_final == 0
    ledger.end(0, "completed")
    ledger.end(1, "stopped")
    ledger.end(2, "failed", "RuntimeError: CUDA error")
    ledger.end(3, "failed", "DivergedError: the loss is nan")
    assert ledger.num_final == Ledger(path).num_final == 3
