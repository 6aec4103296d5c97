import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Trial

from studies.engine.ledger import Ledger
from studies.engine.ledger_callback import ERRORS, LedgerCallback
from studies.engine.protocol import OUT_OF_MEMORY, REPORTED, RESOURCE_MULTIPLIER, RESUMES_AT
from studies.objectives import ACCURACY, SIMILARITY

EPOCHS = 3
PARAMS = {"number": 0, "trial_id": "k_00000", "x": 0.5}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.fixture
def recorder(ledger: Ledger, tmp_path: Path) -> LedgerCallback:
    return LedgerCallback(ledger, tmp_path, (ACCURACY, SIMILARITY), EPOCHS)


def make_trial(number: int = 0, share: int = 1) -> Trial:
    config = PARAMS | {"number": number, "trial_id": f"k_{number:05d}"}
    return Trial(
        "run_trial", stub=True, config=config | {RESOURCE_MULTIPLIER: share, RESUMES_AT: 0}
    )


def report(recorder: LedgerCallback, trial: Trial, **result: Any) -> None:
    """Pass a result to the callback as Ray does, with the values that Ray adds."""
    if OUT_OF_MEMORY not in result:
        result[REPORTED] = list(result)
    result |= {"training_iteration": 1, "time_total_s": 2.5, "done": False}
    recorder.on_trial_result(1, [], trial, result)
    trial.update_last_result(result)  # type: ignore[no-untyped-call]


def test_trial_is_recorded_from_its_start_to_its_end(
    ledger: Ledger, recorder: LedgerCallback
) -> None:
    trial = make_trial()
    recorder.on_trial_start(1, [], trial)
    (history,) = ledger.trials
    assert history.params == PARAMS
    for epoch in range(1, EPOCHS + 1):
        report(recorder, trial, epoch=epoch, val_accuracy=0.9, cam_ssim=0.5)
    recorder.on_trial_complete(1, [], trial)
    assert history.reports[-1] == {"epoch": EPOCHS, "val_accuracy": 0.9, "cam_ssim": 0.5}
    assert (history.epoch, history.state, history.error) == (EPOCHS, "completed", None)


def test_every_number_of_the_trial_is_recorded_and_none_of_ray(
    ledger: Ledger, recorder: LedgerCallback
) -> None:
    trial = make_trial()
    recorder.on_trial_start(1, [], trial)
    metrics = {"epoch": 1, "val_accuracy": 0.9, "cam_ssim": 0.5, "f1": 0.25, "loss": math.inf}
    report(recorder, trial, **metrics)
    assert ledger.trials[0].reports == [metrics]


def test_report_that_bypassed_the_protocol_is_refused(
    ledger: Ledger, recorder: LedgerCallback
) -> None:
    trial = make_trial()
    recorder.on_trial_start(1, [], trial)
    with pytest.raises(ValueError, match=r"through ray\.tune\.report.*protocol\.report"):
        recorder.on_trial_result(1, [], trial, {"epoch": 1, "f1": 0.5, "time_total_s": 1.0})
    assert ledger.trials[0].reports == []


def test_trial_that_ended_without_a_report_has_failed(
    ledger: Ledger, recorder: LedgerCallback
) -> None:
    trial = make_trial()
    recorder.on_trial_start(1, [], trial)
    recorder.on_trial_result(1, [], trial, {"done": True, "training_iteration": 1})
    recorder.on_trial_complete(1, [], trial)
    (history,) = ledger.trials
    assert (history.reports, history.state) == ([], "failed")


def test_trial_that_ends_early_was_stopped(ledger: Ledger, recorder: LedgerCallback) -> None:
    trial = make_trial()
    recorder.on_trial_start(1, [], trial)
    report(recorder, trial, epoch=1, val_accuracy=0.9, cam_ssim=0.5)
    recorder.on_trial_complete(1, [], trial)
    assert ledger.trials[0].state == "stopped"


@pytest.mark.parametrize("objectives", [{"cam_ssim": 0.5}, {"val_accuracy": float("nan")}])
def test_trial_without_its_objectives_has_failed(
    ledger: Ledger, recorder: LedgerCallback, objectives: dict[str, float]
) -> None:
    trial = make_trial()
    recorder.on_trial_start(1, [], trial)
    report(recorder, trial, epoch=EPOCHS, **objectives)
    recorder.on_trial_complete(1, [], trial)
    assert ledger.trials[0].state == "failed"
    assert ledger.trials[0].error == "an objective was not reported as a number"


def test_trial_that_ran_out_of_memory_has_failed_only_where_there_is_no_more(
    ledger: Ledger, recorder: LedgerCallback
) -> None:
    trial = make_trial(share=1)
    recorder.on_trial_start(1, [], trial)
    report(recorder, trial, epoch=1, val_accuracy=0.9, cam_ssim=0.5)
    # The searcher, which Ray calls first, has granted twice the memory.
    ledger.enlarge(0, 2)
    report(recorder, trial, epoch=1, **{OUT_OF_MEMORY: True})
    recorder.on_trial_complete(1, [], trial)
    (history,) = ledger.trials
    assert (history.state, history.epoch) == (None, 1)

    larger = make_trial(share=2)
    recorder.on_trial_start(1, [], larger)
    report(recorder, larger, epoch=1, **{OUT_OF_MEMORY: True})
    recorder.on_trial_complete(1, [], larger)
    assert history.state == "failed"
    assert history.error == "out of memory, with all that a node has"


def test_trial_that_overtook_another_can_run_out_of_memory(
    ledger: Ledger, recorder: LedgerCallback
) -> None:
    trial = make_trial(number=1)
    recorder.on_trial_start(1, [], trial)
    report(recorder, trial, epoch=0, **{OUT_OF_MEMORY: True})
    recorder.on_trial_complete(1, [], trial)
    (history,) = ledger.trials
    assert (history.number, history.state) == (1, "failed")


def test_error_of_a_trial_is_kept(
    ledger: Ledger, recorder: LedgerCallback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Traceback\n  a line\nValueError: the reason\n"
    (tmp_path / "error.txt").write_text(text)
    monkeypatch.setattr(Trial, "error_file", str(tmp_path / "error.txt"))
    trial = make_trial()
    recorder.on_trial_start(1, [], trial)
    recorder.on_trial_error(1, [], trial)
    assert ledger.trials[0].state == "failed"
    assert ledger.trials[0].error == "ValueError: the reason"
    assert (tmp_path / ERRORS / "k_00000.txt").read_text() == text


def test_trial_whose_process_did_not_come_up_has_failed(
    ledger: Ledger, recorder: LedgerCallback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "error_file", None)
    recorder.on_trial_error(1, [], make_trial())
    (history,) = ledger.trials
    assert (history.params, history.state) == (PARAMS, "failed")
    assert history.error == "unknown error"


def test_recorder_that_ray_pickles_holds_nothing(recorder: LedgerCallback) -> None:
    assert vars(pickle.loads(pickle.dumps(recorder))) == {}
