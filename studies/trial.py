"""One trial as Ray runs it: a configuration in, a report with a checkpoint after each epoch."""

import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from ray import tune

from batchcam.config import TrialConfig
from batchcam.train import EpochReport, Inputs, fit
from studies.tracking import Tracking, track

STATE_FILE = "state.pt"
"""Name of the saved state inside a checkpoint."""

_FIELDS = {field.name for field in fields(TrialConfig)}


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a study share, beside their inputs."""

    base: TrialConfig
    threads: int
    tracking: Tracking


def trial_config(base: TrialConfig, params: dict[str, Any]) -> TrialConfig:
    """Return the trial's configuration: the study's, with what the search decided."""
    decided = {name: value for name, value in params.items() if name in _FIELDS}
    return TrialConfig.from_dict(base.as_dict() | decided)


def run_name(config: TrialConfig) -> str:
    """Return a name that a person can tell runs apart by."""
    losses = []
    if config.lambda_proto:
        losses.append(f"proto {config.lambda_proto:.2g}")
    if config.lambda_batch:
        losses.append(f"batch {config.lambda_batch:.2g}")
    loss = f"{config.metric} {' + '.join(losses)}" if losses else "cross-entropy"
    return f"{config.backbone} {config.resolution}px {loss}"


def run_trial(params: dict[str, Any], *, settings: TrialSettings, inputs: Inputs) -> None:
    """Train one trial, reporting each epoch to Ray Tune and to W&B.

    Goes on from the trial's checkpoint if Ray hands it one. Where the scheduler stops the trial,
    Ray raises SystemExit from the report.
    """
    torch.set_num_threads(settings.threads)
    config = trial_config(settings.base, params)
    trial_id = tune.get_context().get_trial_id()
    with track(settings.tracking, trial_id, run_name(config), config.as_dict()) as run:

        def on_epoch(report: EpochReport) -> None:
            run.log(report)
            with tempfile.TemporaryDirectory() as folder:
                report.save_state(Path(folder) / STATE_FILE)
                tune.report(dict(report.metrics), checkpoint=tune.Checkpoint.from_directory(folder))

        checkpoint = tune.get_checkpoint()
        if checkpoint is None:
            fit(config, on_epoch, inputs=inputs)
        else:
            with checkpoint.as_directory() as folder:
                fit(config, on_epoch, inputs=inputs, state=Path(folder) / STATE_FILE)
