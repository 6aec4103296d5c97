"""One trial as Ray runs it: trains a configuration, reports each epoch, saves checkpoints.

Checkpoints are stored under the trial's id in the study, which does not change between runs of the
study. A trial therefore resumes from them after any interruption: by Ray, by the loss of its node,
or by the end of the driver.
"""

from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.devices import is_out_of_memory, release_memory
from batchcam.errors import ConfigError
from batchcam.export.model_card import loss_name, loss_terms
from batchcam.figures import tile
from batchcam.losses import TERMS, compares_cams
from batchcam.training.fit import EpochReport, fit, load_state
from studies.engine.checkpoints import Checkpoints
from studies.engine.protocol import (
    RESOURCE_MULTIPLIER,
    RESUMES_AT,
    TRIAL_ID,
    report_again,
    report_out_of_memory,
    report_unusable_node,
)
from studies.engine.protocol import report as report_metrics
from studies.engine.retry import retry_in_trial
from studies.monitoring.wandb_runs import Tracking, track
from studies.planning.devices import check_device, trial_device
from studies.planning.resources import TrialResources

METRICS = (
    "epoch",
    "val_accuracy",
    "cam_ssim",
    "cam_ssim_ceiling",
    "cam_ssim_sample",
    "images_per_second",
    "seconds",
    "loss",
    *(f"loss_{name}" for name in TERMS),
)
"""Metrics of a trial in the order of trials.csv, by their names in `EpochReport.metrics`."""

_FIELDS = {field.name for field in fields(TrialConfig)}


@dataclass(frozen=True)
class TrialSettings:
    """Settings that all trials of a study share.

    Attributes:
        base: the configuration whose other fields the search sets.
        resources: the resources of a trial, which set its threads and its device.
        checkpoints: the folder, or URI, that holds a folder of checkpoints per trial.
        tracking: where the W&B runs are recorded.
    """

    base: TrialConfig
    resources: TrialResources
    checkpoints: str
    tracking: Tracking


def trial_config(base: TrialConfig, params: dict[str, Any]) -> TrialConfig:
    """Return the trial's configuration: `base` with the fields that the search set."""
    searched = {name: value for name, value in params.items() if name in _FIELDS}
    return TrialConfig.from_dict(base.as_dict() | searched)


def run_name(config: TrialConfig) -> str:
    """Return the display name of a trial's run: backbone, resolution and loss."""
    return f"{config.backbone} {config.resolution}px {loss_name(config)}"


def run_tags(config: TrialConfig) -> tuple[str, ...]:
    """Return the tags of a trial's run: data set, backbone, resolution, losses and metric."""
    used = loss_terms(config) or ["cross-entropy"]
    metric = [config.metric.upper()] if compares_cams(config) else []
    return (config.dataset, config.backbone, f"{config.resolution}px", *used, *metric)


def run_trial(params: dict[str, Any], *, settings: TrialSettings, prepared: PreparedData) -> None:
    """Train one trial, and report each epoch to Ray Tune and to W&B.

    Resumes from the trial's newest checkpoint, if there is one. Epochs of the checkpoint that the
    ledger lacks are reported first. If the scheduler stops the trial, Ray raises SystemExit from
    the report. The process may have run another trial, whose memory is returned first. The device
    follows from the resources. It is not recorded, so that the trial's configuration can be used on
    another machine.
    """
    release_memory()
    resources = settings.resources.enlarged(params[RESOURCE_MULTIPLIER])
    torch.set_num_threads(resources.threads)
    config = trial_config(settings.base, params)
    device = trial_device(config, resources.gpus)
    folder = f"{settings.checkpoints}/{params[TRIAL_ID]}"
    checkpoints = retry_in_trial(lambda: Checkpoints(folder), folder)
    last = params[RESUMES_AT]
    try:
        check_device(device)
    except ConfigError as error:
        report_unusable_node(last, str(error))
        return
    with (
        ExitStack() as stack,
        track(
            settings.tracking,
            params[TRIAL_ID],
            run_name(config),
            config.as_dict(),
            run_tags(config),
        ) as run,
    ):
        state = retry_in_trial(lambda: stack.enter_context(checkpoints.newest()), folder)

        def on_epoch(report: EpochReport) -> None:
            nonlocal last
            retry_in_trial(lambda: checkpoints.save(report.epoch, report.save_state), folder)
            picture = tile(report.evaluation.maps_PRR, report.prototypes_PRR)
            retry_in_trial(lambda: checkpoints.save_picture(picture), folder)
            run.log(report, picture)
            report_metrics(report.metrics)
            last = report.epoch

        short_of_memory = False
        try:
            if state is not None:
                last = report_again(load_state(state)["history"], last)
            if last < config.epochs:
                placed = replace(config, device=device)
                fit(placed, on_epoch, prepared=prepared, state=state)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            short_of_memory = True
        if short_of_memory:  # Outside of the handler, whose exception holds the tensors.
            release_memory()
            report_out_of_memory(last)
