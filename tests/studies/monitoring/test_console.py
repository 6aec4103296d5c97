from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Trial

from studies.engine.ledger import LEDGER, Ledger
from studies.engine.protocol import OUT_OF_MEMORY
from studies.monitoring.console import TrialLines

METRICS = {
    "val_accuracy": 0.98765,
    "cam_ssim": 0.5,
    "cam_ssim_ceiling": 0.99,
    "images_per_second": 1234.5,
    "epoch": 4,
}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return a ledger with one running trial."""
    ledger = Ledger(tmp_path / LEDGER)
    ledger.propose({"number": 0, "trial_id": "abc"})
    return ledger


def make_trial(trial_id: str, last: dict[str, Any]) -> Trial:
    config = {"trial_id": trial_id, "number": 0, "share": 1}
    trial = Trial("run_trial", stub=True, config=config)
    trial.update_last_result(last | {"trial_id": "of Ray", "training_iteration": 1})  # type: ignore[no-untyped-call]
    return trial


def test_trial_that_ended_is_one_line(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    lines = TrialLines(ledger, num_trials=12)
    lines.on_trial_complete(1, [], make_trial("abc", METRICS))
    assert capsys.readouterr().out == (
        "   1/12  abc  accuracy 0.9877  SSIM 0.500 of 0.990  1,234 images/s  after 4 epochs\n"
    )


def test_trial_without_a_report_is_a_line_too(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    TrialLines(ledger, num_trials=2).on_trial_complete(1, [], make_trial("abc", {}))
    assert capsys.readouterr().out == "   1/2  abc  ended without a report\n"


def test_trial_that_failed_is_named_with_its_file(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.end(0, "failed", "ValueError: the reason")
    TrialLines(ledger, num_trials=2).on_trial_error(1, [], make_trial("abc", METRICS))
    assert capsys.readouterr().out == "   1/2  abc  failed; see errors/abc.txt\n"


def test_trial_that_is_to_start_again_is_not_counted(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = TrialLines(ledger, num_trials=2)
    lines.on_trial_complete(1, [], make_trial("abc", {"epoch": 1, OUT_OF_MEMORY: True}))
    lines.on_trial_complete(1, [], make_trial("abc", METRICS))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "          abc  out of memory"
    assert second.startswith("   1/2  abc  accuracy")


def test_process_that_died_is_a_line_that_is_not_counted(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = TrialLines(ledger, num_trials=2)
    lines.on_trial_error(1, [], make_trial("abc", {}))
    ledger.enlarge(0, 2)
    lines.on_trial_error(1, [], make_trial("abc", {}))
    assert capsys.readouterr().out == (
        "          abc  failed; starts again\n          abc  out of memory\n"
    )


def test_count_goes_on_after_resuming(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    TrialLines(ledger, num_trials=3, ended=1).on_trial_complete(1, [], make_trial("b", METRICS))
    assert capsys.readouterr().out.startswith("   2/3  b  ")
