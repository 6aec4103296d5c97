import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from ray import tune

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError
from batchcam.train import EpochReport, Inputs
from studies.tracking import Tracking
from studies.trial import TrialSettings, run_name, run_trial, trial_config
from tests.studies.conftest import Recorded


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
        ({"lambda_batch": 0.123}, "simple_cnn 28px l1 batch 0.12"),
        (
            {"lambda_proto": 2.0, "lambda_batch": 0.1, "metric": "ssim", "backbone": "resnet18"},
            "resnet18 28px ssim proto 2 + batch 0.1",
        ),
    ],
)
def test_run_is_named_by_what_it_tries(fields: dict[str, Any], name: str) -> None:
    assert run_name(TrialConfig(**fields)) == name


def crash_once(
    params: dict[str, Any], *, settings: TrialSettings, inputs: Inputs, crashed: Path
) -> None:
    """Run a trial whose process is killed after its second epoch, the first time."""
    report = tune.report

    def report_and_crash(metrics: dict[str, Any], **options: Any) -> None:
        report(metrics, **options)
        if metrics["epoch"] == 2 and not crashed.exists():
            crashed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(tune, "report", report_and_crash):
        run_trial(params, settings=settings, inputs=inputs)


@pytest.mark.usefixtures("local_ray")
def test_trial_that_crashes_goes_on_to_the_end_it_would_have_had(
    config: TrialConfig,
    inputs: Inputs,
    reports: list[tuple[EpochReport, tune.Checkpoint]],
    recorded: Callable[[Path], list[Recorded]],
    tmp_path: Path,
) -> None:
    tracking = Tracking("batchcam", "group", tmp_path, "offline")
    trainable = tune.with_parameters(
        crash_once,
        settings=TrialSettings(replace(config, lambda_batch=9.0), 1, tracking),
        inputs=inputs,
        crashed=tmp_path / "crashed",
    )
    results = tune.Tuner(
        trainable,
        param_space={"lambda_batch": config.lambda_batch},
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
    assert list(result.metrics_dataframe["epoch"]) == [1, 2, 3]
    # Each epoch was trained once, and as if nothing had happened.
    timed = ("images_per_second", "seconds")
    for (report, _), (_, row) in zip(reports, result.metrics_dataframe.iterrows(), strict=True):
        for name, value in report.metrics.items():
            assert name in timed or row[name] == value, name
    # What W&B had not written yet went with the process; the rest is in one more file.
    last = recorded(tmp_path)[-1]
    assert [item["epoch"] for item in last.history] == [3]
    assert last.exit_code == 0
