"""Check the status table: its content, its 80 columns, and no output without a terminal."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from studies.engine.ledger import Ledger
from studies.engine.protocol import Objective
from studies.monitoring.status_table import StatusTable, live_table
from studies.objectives import ACCURACY, SIMILARITY
from tests.studies.conftest import ROOT


class Clock:
    """A clock that tests set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def _text(table: StatusTable, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def _report(epoch: int, accuracy: float, ssim: float) -> dict[str, float]:
    return {
        "epoch": epoch,
        "val_accuracy": accuracy,
        "cam_ssim": ssim,
        "images_per_second": 1234.5,
    }


def _table(ledger: Ledger, clock: Clock) -> StatusTable:
    return StatusTable(ledger, 5, (ACCURACY, SIMILARITY), 4, clock)


def test_it_counts_and_names_the_best_and_the_time_left(ledger: Ledger) -> None:
    clock = Clock()
    table = _table(ledger, clock)
    assert _text(table)[1] == "0 of 5 trials ended, 0 running"
    for number in range(4):
        ledger.propose({"number": number, "trial_id": f"key_{number:05d}"})
    for epoch in range(1, 5):
        ledger.report(0, _report(epoch, 0.9, 0.2))
    ledger.end(0, "completed")
    ledger.report(1, _report(1, 0.8, 0.7))
    ledger.end(1, "stopped")
    ledger.end(2, "failed", "it broke")
    ledger.report(3, _report(1, 0.95, 0.1))
    clock.now = 60.0
    lines = _text(table)
    # Six epochs took a minute. Three epochs of trial 3 and four of the next trial are left.
    assert lines[1] == "3 of 5 trials ended (1 completed, 1 stopped, 1 failed), 1 running"
    assert lines[2] == "best val_accuracy 0.9000, cam_ssim 0.7000; 2 on the Pareto front"
    assert lines[3] == "0:01:10 left at most"
    (row,) = [line for line in lines if "key_00003" in line]
    assert row.split() == ["key_00003", "1/4", "0.9500", "0.1000", "1,234"]
    assert not any("key_00000" in line for line in lines)


def test_best_of_a_minimised_objective_is_the_smallest(ledger: Ledger) -> None:
    objectives = (ACCURACY, Objective("loss", "loss", "minimize"))
    table = StatusTable(ledger, 3, objectives, 1, Clock())
    for number, (accuracy, loss) in enumerate([(0.9, 0.3), (0.8, 0.2), (0.7, 0.4)]):
        ledger.propose({"number": number, "trial_id": f"key_{number:05d}"})
        ledger.report(number, {"epoch": 1, "val_accuracy": accuracy, "loss": loss})
        ledger.end(number, "completed")
    assert _text(table)[2] == "best val_accuracy 0.9000, loss 0.2000; 2 on the Pareto front"


def test_it_fits_eighty_columns_however_many_run(ledger: Ledger) -> None:
    table = StatusTable(ledger, 10_000, (ACCURACY, SIMILARITY), 100, Clock())
    for number in range(40):
        ledger.propose({"number": number, "trial_id": "a-very-long-name-of-a-study_" + "0" * 30})
        ledger.report(number, _report(50, 0.123456, 0.654321))
    lines = _text(table)
    assert max(map(len, lines)) <= 80
    assert len(lines) < 22
    assert any("and 28 more" in line for line in lines)


def test_without_a_terminal_nothing_is_shown(ledger: Ledger) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with live_table(console, _table(ledger, Clock())):
        console.print("a line")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "a line\n"


def test_on_a_terminal_the_table_is_shown_and_removed(ledger: Ledger) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with live_table(console, _table(ledger, Clock())):
        console.print("a line")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "a line\n" in text
    assert "0 of 5 trials ended" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # The cursor is shown again.


@pytest.mark.faults
def test_a_sweep_on_a_terminal_shows_the_table_and_leaves_the_lines(
    environment: dict[str, str], tmp_path: Path
) -> None:
    master, slave = pty.openpty()
    words = ["--num-trials", "2", "--max-epochs", "2", "--resolutions", "14"]
    sweep = subprocess.Popen(
        [sys.executable, ROOT / "studies" / "bcpl_sweep.py", *words],
        cwd=tmp_path,
        env=environment | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        stdout=slave,
        stderr=subprocess.DEVNULL,
    )
    os.close(slave)
    seen = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # The study closed its end of the terminal.
            break
        if not part:
            break
        seen += part
    os.close(master)
    assert sweep.wait(timeout=60) == 0
    text = seen.decode()
    assert "of 2 trials ended" in text
    assert "images/s" in text
    assert "   2/2  " in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # The cursor is shown again.
