"""Tests of the benchmark of large studies, with a small one."""

import json
from pathlib import Path

import pytest

from studies.benchmarks import scale


@pytest.mark.faults
@pytest.mark.xdist_group("ray")
def test_every_window_of_trials_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "_WINDOW", 5)
    scale.main(scale.Scale(out=tmp_path, trials=20, at_a_time=2, epochs=3))
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured["trials_ended"] == [10, 15, 20]
    assert 20 <= measured["reports"] <= 60
    assert all(time > 0 for time in measured["driver_cpu_milliseconds_per_report"])
    assert all(size > 0 for size in measured["resident_mebibytes"])
    assert (tmp_path / "scale.png").stat().st_size > 0
