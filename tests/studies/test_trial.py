import os
import platform
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ray import tune

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.errors import ConfigError
from batchcam.training.fit import EpochReport, load_state
from studies.engine import retry as patience
from studies.engine.checkpoints import Checkpoints
from studies.engine.protocol import OUT_OF_MEMORY, RESOURCE_MULTIPLIER, RESUMES_AT
from studies.engine.retry import retry_in_trial
from studies.monitoring.wandb_runs import Tracking
from studies.planning.resources import TrialResources
from studies.trial import (
    TrialSettings,
    run_name,
    run_tags,
    run_trial,
    trial_config,
)
from tests.studies.conftest import Recorded

PARAMS = {"number": 0, "trial_id": "k_00000", RESOURCE_MULTIPLIER: 1, RESUMES_AT: 0}


def make_settings(folder: Path, base: TrialConfig) -> TrialSettings:
    """Return the settings of trials with one CPU and with all files below `folder`."""
    return TrialSettings(
        base=base,
        resources=TrialResources(1.0, 0.0, 2.0),
        checkpoints=str(folder / "checkpoints"),
        tracking=Tracking("batchcam", "group", folder, "offline"),
    )


def test_search_decides_over_the_base() -> None:
    base = TrialConfig(epochs=7, lambda_batch=0.1)
    config = trial_config(base, {"lambda_batch": 0.5, "metric": "ssim"})
    assert config == replace(base, lambda_batch=0.5, metric="ssim")


def test_what_is_no_field_of_the_configuration_is_left_out() -> None:
    assert trial_config(TrialConfig(), {"proto_loss": True, "number": 3}) == TrialConfig()


def test_value_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="metric='sim' is unknown"):
        trial_config(TrialConfig(), {"metric": "sim"})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"lambda_batch": 0.0}, "simple_cnn 28px cross-entropy"),
        ({"lambda_batch": 0.123}, "simple_cnn 28px BCPL 0.123 (L1)"),
        (
            {"lambda_proto": 2.0, "lambda_batch": 0.1, "metric": "ssim", "backbone": "resnet18"},
            "resnet18 28px Prototype Loss 2 (SSIM) + BCPL 0.1 (SSIM)",
        ),
    ],
)
def test_run_is_named_by_what_it_tries(fields: dict[str, Any], name: str) -> None:
    assert run_name(TrialConfig(**fields)) == name


def test_tags_say_of_what_kind_a_run_is() -> None:
    assert run_tags(TrialConfig(lambda_batch=0.0)) == (
        "digits",
        "simple_cnn",
        "28px",
        "cross-entropy",
    )
    both = TrialConfig(metric="ssim", lambda_batch=0.1, lambda_energy=3.0)
    assert run_tags(both)[3:] == ("BCPL", "prototype energy", "SSIM")


def crash_once(
    params: dict[str, Any], *, settings: TrialSettings, prepared: PreparedData, crashed: Path
) -> None:
    """Run a trial; kill its process after the second epoch, but only the first time."""
    report = tune.report

    def report_and_crash(metrics: dict[str, Any]) -> None:
        report(metrics)
        if metrics["epoch"] == 2 and not crashed.exists():
            crashed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(tune, "report", report_and_crash):
        run_trial(params, settings=settings, prepared=prepared)


@pytest.mark.faults
@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("local_ray")
def test_trial_that_crashes_goes_on_to_the_end_it_would_have_had(
    config: TrialConfig,
    prepared: PreparedData,
    reports: list[tuple[EpochReport, str]],
    recorded: Callable[[Path], list[Recorded]],
    tmp_path: Path,
) -> None:
    settings = make_settings(tmp_path, replace(config, lambda_batch=9.0))
    results = tune.Tuner(
        tune.with_parameters(
            crash_once, settings=settings, prepared=prepared, crashed=tmp_path / "crashed"
        ),
        param_space=PARAMS | {"lambda_batch": config.lambda_batch},
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "ray"),
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    ).fit()
    result = results[0]
    assert (tmp_path / "crashed").exists()
    assert result.error is None
    assert result.metrics_dataframe is not None
    # The resumed trial repeats all reports after `RESUMES_AT`. The ledger drops repeated reports.
    rows = result.metrics_dataframe.drop_duplicates("epoch", keep="last")
    assert list(rows["epoch"]) == [1, 2, 3]
    # Each epoch was trained once, with the same result as without the crash.
    timed = ("images_per_second", "seconds")
    for (report, _), (_, row) in zip(reports, rows.iterrows(), strict=True):
        for name, value in report.metrics.items():
            assert name in timed or row[name] == value, name
    # Records that W&B had not written were lost with the process. The resumed run has a new file.
    last = recorded(tmp_path)[-1]
    assert [item["epoch"] for item in last.history] == [3]
    assert last.exit_code == 0


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the list of what a trial in this process reports; it grows with each report."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", found.append)
    return found


def test_trial_keeps_a_state_before_it_reports(
    config: TrialConfig,
    prepared: PreparedData,
    reported: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = []

    def look(metrics: dict[str, Any]) -> None:
        with Checkpoints(str(tmp_path / "checkpoints/k_00000")).newest() as state:
            kept.append(0 if state is None else load_state(state)["history"][-1]["epoch"])
        reported.append(metrics)

    monkeypatch.setattr(tune, "report", look)
    run_trial(PARAMS, settings=make_settings(tmp_path, config), prepared=prepared)
    assert [metrics["epoch"] for metrics in reported] == kept == [1, 2, 3]


@pytest.mark.parametrize(("resumes_at", "again"), [(0, [1, 2, 3]), (2, [3]), (3, [])])
def test_trial_that_had_ended_reports_what_the_study_has_not_heard(
    config: TrialConfig,
    prepared: PreparedData,
    reported: list[dict[str, Any]],
    tmp_path: Path,
    resumes_at: int,
    again: list[int],
) -> None:
    settings = make_settings(tmp_path, config)
    run_trial(PARAMS, settings=settings, prepared=prepared)
    whole, reported[:] = list(reported), []
    run_trial(PARAMS | {RESUMES_AT: resumes_at}, settings=settings, prepared=prepared)
    assert reported == [metrics for metrics in whole if metrics["epoch"] in again]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_trial_that_runs_out_of_memory_says_so_with_the_epoch_it_has(
    config: TrialConfig,
    prepared: PreparedData,
    reported: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(metrics: dict[str, Any]) -> None:
        reported.append(metrics)
        if metrics["epoch"] == 2 and OUT_OF_MEMORY not in metrics:
            raise error

    monkeypatch.setattr(tune, "report", fail)
    run_trial(PARAMS, settings=make_settings(tmp_path, config), prepared=prepared)
    assert [metrics["epoch"] for metrics in reported[:2]] == [1, 2]
    assert reported[2] == {"epoch": 1, OUT_OF_MEMORY: True}


def test_checkpoint_that_does_not_fit_into_memory_is_out_of_memory(
    config: TrialConfig,
    prepared: PreparedData,
    reported: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings(tmp_path, replace(config, epochs=1))
    run_trial(PARAMS, settings=settings, prepared=prepared)
    reported.clear()

    def fail(_: Path) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("studies.trial.load_state", fail)
    run_trial(PARAMS | {RESUMES_AT: 1}, settings=settings, prepared=prepared)
    assert reported == [{"epoch": 1, OUT_OF_MEMORY: True}]


def test_other_errors_of_a_trial_are_raised(
    config: TrialConfig,
    prepared: PreparedData,
    reported: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("studies.trial.fit", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_trial(PARAMS, settings=make_settings(tmp_path, config), prepared=prepared)
    assert reported == []


STATUS = Path("/proc/self/status")


def measure(
    params: dict[str, Any], *, settings: TrialSettings, prepared: PreparedData, folder: Path
) -> None:
    """Run a small, a large and a small trial; write each one's process and resident MiB."""
    step = params["step"]
    large = {"backbone": "resnet18", "resolution": 112, "batch_size": 200}
    sizes = large if step == 1 else {"backbone": "simple_cnn", "resolution": 14}
    run_trial(params | sizes | {"trial_id": f"k_{step}"}, settings=settings, prepared=prepared)
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    (folder / f"{step}.txt").write_text(f"{os.getpid()} {int(line.split()[1]) // 1024}")


@pytest.mark.faults
@pytest.mark.skipif(not STATUS.exists(), reason="reads the memory of a process from /proc")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("local_ray")
def test_small_trial_does_not_keep_the_memory_of_a_large_one_in_its_process(
    config: TrialConfig, prepared: PreparedData, tmp_path: Path
) -> None:
    settings = make_settings(tmp_path, replace(config, epochs=1))
    tune.Tuner(
        tune.with_parameters(measure, settings=settings, prepared=prepared, folder=tmp_path),
        param_space=PARAMS | {"step": tune.grid_search([0, 1, 2])},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "ray"), verbose=0),
    ).fit()
    found = [(tmp_path / f"{step}.txt").read_text().split() for step in range(3)]
    assert len({process for process, _ in found}) == 1
    before, large, after = (int(resident) for _, resident in found)
    assert large - before > 500
    # Code that was loaded for the large model stays, and pages that hold something in use.
    assert after - before < 0.25 * (large - before)


def test_trial_of_a_larger_share_has_more_threads(
    config: TrialConfig, prepared: PreparedData, reported: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings = make_settings(tmp_path, replace(config, epochs=1))
    try:
        run_trial(PARAMS | {RESOURCE_MULTIPLIER: 2}, settings=settings, prepared=prepared)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert len(reported) == 1


def test_state_that_cannot_be_kept_fails_the_trial_and_not_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "RETRY_SECONDS", 0.1)
    (tmp_path / "file").touch()
    kept = Checkpoints(str(tmp_path / "file/trial"))
    with pytest.raises(OSError, match=r"file/trial cannot be used for 0 s"):
        retry_in_trial(lambda: kept.save(1, Path.touch), kept.folder)
