from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from batchcam.data.prepared import PreparedData
from studies.planning.forecast import Forecast, forecast, print_forecast, sample_configs
from studies.planning.probe import Probe
from studies.planning.probing import probe_configs
from studies.planning.resources import TrialResources
from studies.settings import StudySettings
from studies.space import SearchSpace

STRIDES = {("simple_cnn", 14): (None,), ("resnet18", 14): (4, 8)}


@pytest.fixture
def settings() -> StudySettings:
    return StudySettings(
        num_trials=10,
        max_epochs=8,
        min_epochs=1,
        space=SearchSpace(backbones=("simple_cnn", "resnet18"), resolutions=(14,)),
    )


def probes(settings: StudySettings) -> list[Probe]:
    """Return plausible probes: two configurations of the same speed, and one out of memory."""
    found = [
        Probe(config, 1, 100.0, 50.0, 2**30, 8 * 2**30)
        for config in probe_configs(settings.base_config(), settings.space, STRIDES)
    ]
    return [*found[:-1], Probe(found[-1].config, 1, error="out of memory")]


def test_the_dearest_of_each_kind_is_probed(settings: StudySettings) -> None:
    configs = list(probe_configs(settings.base_config(), settings.space, STRIDES))
    assert [(config.backbone, config.output_stride) for config in configs] == [
        ("simple_cnn", None),
        ("resnet18", 4),
        ("resnet18", 8),
    ]
    assert {config.metric for config in configs} == {"ssim"}
    assert all(config.lambda_proto and config.lambda_batch for config in configs)


def test_epochs_and_hours_add_up(settings: StudySettings, prepared: PreparedData) -> None:
    configs = [each.config for each in probes(settings)]
    result = forecast(settings, configs, probes(settings), prepared, at_a_time=2)
    assert (result.max_epochs, result.at_a_time, result.trials) == (80, 2, 10)
    # Half of the trials stop at each rung, epochs 1, 2 and 4: 1 + 1/2 + 2/4 + 4/8 epochs a trial.
    assert result.min_epochs == 25
    # 200 training images at 100 per second, 100 validation images at 50; two trials at a time.
    assert result.max_hours == pytest.approx(80 * (2 + 2) / 2 / 3600)
    assert result.min_hours == pytest.approx(25 * (2 + 2) / 2 / 3600)
    assert result.peak_bytes == 2**30


def test_without_early_stopping_there_is_one_number(
    settings: StudySettings, prepared: PreparedData
) -> None:
    settings = replace(settings, min_epochs=8)
    result = forecast(settings, [], probes(settings), prepared, 1)
    assert result.max_epochs == result.min_epochs == 80


def test_no_more_trials_run_at_a_time_than_there_are(
    settings: StudySettings, prepared: PreparedData
) -> None:
    configs = [each.config for each in probes(settings)]
    result = forecast(settings, configs, probes(settings), prepared, at_a_time=64)
    assert result.at_a_time == 10
    assert result.max_hours == pytest.approx(80 * (2 + 2) / 10 / 3600)


def test_sampled_configurations_are_of_the_space(settings: StudySettings) -> None:
    configs = sample_configs(settings, STRIDES, 30)
    assert {config.backbone for config in configs} == {"simple_cnn", "resnet18"}
    assert {config.output_stride for config in configs} == {None, 4, 8}
    assert configs == sample_configs(settings, STRIDES, 30)


def test_forecast_can_be_read(settings: StudySettings) -> None:
    stream = StringIO()
    result = Forecast(10, 2, 80, 25, 2.5, 0.5, 2**30)
    resources = TrialResources(1.0, 0.25, 8.0)
    console = Console(file=stream, width=90)
    print_forecast(console, settings, probes(settings), resources, result)
    text = " ".join(stream.getvalue().split())
    assert "simple_cnn 14 own 100 50 1.0 GiB 8" in text
    assert "resnet18 14 8 out of memory" in text
    assert "1 CPU and 0.25 GPU, so that 2 run at a time; the largest takes 1.0 GiB" in text
    assert "80 epochs in 2.5 h if none is stopped early; 25 in 30.0 min" in text
