"""One trial as Ray runs it: a configuration in, a report after each epoch, its state kept.

A trial keeps its own checkpoints, under the id that it has in the study rather than in this run of
it. So it goes on from them however it was cut: by Ray, with its node, or with the driver.
"""

from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
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
)
from studies.engine.protocol import report as report_metrics
from studies.engine.retry import retry_in_trial
from studies.monitoring.wandb_runs import Tracking, track
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
"""The metrics of a trial in the order of trials.csv, named as `EpochReport.metrics` names them."""

_FIELDS = {field.name for field in fields(TrialConfig)}


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a study share, beside their prepared.

    Attributes:
        base: what the search does not decide.
        resources: what a trial has, which sets its threads.
        checkpoints: the folder, or URI, under which each trial has one of its own.
        tracking: where its W&B run goes.
    """

    base: TrialConfig
    resources: TrialResources
    checkpoints: str
    tracking: Tracking


def trial_config(base: TrialConfig, params: dict[str, Any]) -> TrialConfig:
    """Return the trial's configuration: the study's, with what the search decided."""
    decided = {name: value for name, value in params.items() if name in _FIELDS}
    return TrialConfig.from_dict(base.as_dict() | decided)


def run_name(config: TrialConfig) -> str:
    """Return a name that a person can tell runs apart by."""
    return f"{config.backbone} {config.resolution}px {loss_name(config)}"


def run_tags(config: TrialConfig) -> tuple[str, ...]:
    """Return words by which a person finds runs of a kind."""
    used = loss_terms(config) or ["cross-entropy"]
    metric = [config.metric.upper()] if compares_cams(config) else []
    return (config.dataset, config.backbone, f"{config.resolution}px", *used, *metric)


def run_trial(params: dict[str, Any], *, settings: TrialSettings, prepared: PreparedData) -> None:
    """Train one trial, reporting each epoch to Ray Tune and to W&B.

    Goes on from the trial's newest checkpoint if it has any; epochs in it that the study has not
    heard of are reported first. Where the scheduler stops the trial, Ray raises SystemExit from the
    report.
    """
    torch.set_num_threads(settings.resources.enlarged(params[RESOURCE_MULTIPLIER]).threads)
    config = trial_config(settings.base, params)
    folder = f"{settings.checkpoints}/{params[TRIAL_ID]}"
    checkpoints = retry_in_trial(lambda: Checkpoints(folder), folder)
    last = params[RESUMES_AT]
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

        if state is not None:
            last = report_again(load_state(state)["history"], last)
            if last >= config.epochs:
                return
        try:
            fit(config, on_epoch, prepared=prepared, state=state)
        except (torch.OutOfMemoryError, MemoryError):
            report_out_of_memory(last)
