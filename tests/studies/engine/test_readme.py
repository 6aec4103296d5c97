"""Check that the example in the engine's README.md runs unchanged."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from studies.engine.ledger import LEDGER, Ledger
from tests.studies.conftest import ROOT

pytestmark = pytest.mark.xdist_group("ray")


def test_example_of_the_page_runs(environment: dict[str, str], tmp_path: Path) -> None:
    page = (ROOT / "studies" / "engine" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    script = tmp_path / "search.py"
    script.write_text(code)
    folder = tmp_path / "folder"
    done = subprocess.run(
        [sys.executable, script, folder],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    trials = Ledger(folder / LEDGER).trials
    assert len(trials) == 6
    assert {trial.state for trial in trials} == {"completed", "stopped"}
    assert all(set(trial.reports[-1]) == {"epoch", "loss", "rate"} for trial in trials)
    shown = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert [(int(number), state) for number, state, _ in shown] == [
        (trial.number, trial.state) for trial in trials
    ]
