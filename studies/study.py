"""A study from its settings to its exports: what runs on the driver."""

import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import tyro
from ray import tune

from batchcam.bundle import check_writable
from batchcam.errors import BatchCamError, ConfigError
from batchcam.models import create_model, feature_grid
from batchcam.train import Inputs, prepare
from studies import export, summary
from studies.progress import TrialLines, console
from studies.resources import TrialResources, choose_resources
from studies.scheduler import make_scheduler
from studies.search import make_search
from studies.settings import SETTINGS_FILE, StudySettings
from studies.space import Strides, feasible_strides
from studies.tracking import Tracking, choose_mode
from studies.trial import TrialSettings, run_trial

RAY_FOLDER = "ray"
"""Where, in the study's folder, Ray keeps its trials and checkpoints."""

_REACH_SECONDS = 10

_DRIVER_ENVIRONMENT = {
    # Ray would warn that it saves its state after every checkpoint, which is what we want of it.
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # Seconds between two savings of its state: at once, for a crash loses what came after.
    "TUNE_GLOBAL_CHECKPOINT_S": "0",
    # Its newer output cannot be silenced; `studies.progress` says what there is to say.
    "RAY_AIR_NEW_OUTPUT": "0",
}

# A reused actor is reset only once its last trial's thread has ended, and that thread may have a
# W&B run to finish.
_WORKER_ENVIRONMENT = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "60"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study from a command line, and exit with 2 where the user can mend what went wrong."""
    try:
        settings = tyro.cli(StudySettings, args=argv).named()
        run_study(settings)
    except BatchCamError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_study(settings: StudySettings) -> Path:
    """Run a study, or go on with one, and export its best; return its folder.

    Raises:
        BatchCamError: the settings, the data or the folder cannot be used, or no trial succeeded.
    """
    if settings.resume:
        settings = settings.resumed()
    else:
        _check_new(settings)
    inputs = prepare(settings.base_config())
    strides = feasible_strides(settings.space, inputs.data.channels)
    _fill_ceilings(inputs, strides)
    if settings.pretrained:  # Better no study than one whose every trial fails.
        for backbone in settings.space.backbones:
            create_model(backbone, pretrained=True)
    mode, why = choose_mode()

    _connect(settings.address)
    try:
        resources = choose_resources(settings.cpus_per_trial, settings.gpus_per_trial)
        if not settings.resume:  # From here on there is something to resume.
            settings.folder.mkdir(parents=True, exist_ok=True)
            settings.save()
        console.print(
            f"Study {settings.study}: {settings.num_trials} trials of up to "
            f"{settings.max_epochs} epochs on {settings.dataset}, {resources.cpus:g} CPU and "
            f"{resources.gpus:g} GPU each; W&B {mode} ({why})"
        )
        tracking = Tracking(settings.wandb_project, settings.study or "", settings.folder, mode)
        results = _tuner(settings, inputs, strides, resources, tracking).fit()
        return _export(settings, results, inputs)
    finally:
        ray.shutdown()


def _check_new(settings: StudySettings) -> None:
    """Refuse to overwrite a study, or to start one whose results could not be written."""
    if (settings.folder / SETTINGS_FILE).is_file():
        raise ConfigError(
            f"study {settings.study!r} exists in {settings.folder.parent}; go on with it by "
            "--resume, or choose another name."
        )
    check_writable(settings.folder)


def _fill_ceilings(inputs: Inputs, strides: Strides) -> None:
    """Compute the SSIM ceiling of every grid that can occur, once for all trials."""
    for (backbone, resolution), options in strides.items():
        for stride in options:
            grid = feature_grid(backbone, resolution, inputs.data.channels, stride)
            inputs.ceiling(resolution, grid)


def _connect(address: str | None) -> None:
    """Join the cluster that is named; start a local one if none is.

    Ray on its own would join whatever cluster happens to run on this machine.
    """
    os.environ.update(_DRIVER_ENVIRONMENT)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": _WORKER_ENVIRONMENT},
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    if address == "local":
        ray.init(address="local", include_dashboard=False, **options)
        return
    try:
        _check_reachable(address)
        ray.init(address=address, **options)
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"no Ray cluster answers at {address!r}: {reason}. Start one with "
            "`ray start --head`, or leave out --address and RAY_ADDRESS for a local one."
        ) from error


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens there, which Ray would find out in some twenty minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()


def _tuner(
    settings: StudySettings,
    inputs: Inputs,
    strides: Strides,
    resources: TrialResources,
    tracking: Tracking,
) -> tune.Tuner:
    trial_settings = TrialSettings(settings.base_config(), resources.threads, tracking)
    # with_parameters puts the inputs into the object store once; trials map them from there.
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, settings=trial_settings, inputs=inputs),
        resources.as_ray(),
    )
    saved = str(settings.folder / RAY_FOLDER)
    if settings.resume and tune.Tuner.can_restore(saved):
        return tune.Tuner.restore(saved, trainable=trainable, resume_errored=True)
    # Several objectives go to the searcher alone: Tune itself takes a single metric.
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=settings.num_trials,
            search_alg=make_search(
                settings.space,
                strides,
                settings.objectives,
                settings.folder,
                settings.study or "",
                settings.seed,
            ),
            scheduler=make_scheduler(
                settings.objectives[0], settings.min_epochs, settings.max_epochs
            ),
            reuse_actors=True,
            trial_dirname_creator=_trial_folder,
        ),
        run_config=tune.RunConfig(
            name=RAY_FOLDER,
            storage_path=str(settings.folder),
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            # Two: Ray deletes a checkpoint before it notes that there is a newer one.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            callbacks=[TrialLines(settings.num_trials)],
            verbose=0,
        ),
    )


def _trial_folder(trial: "tune.experiment.Trial") -> str:
    return str(trial.trial_id)


def _export(settings: StudySettings, results: tune.ResultGrid, inputs: Inputs) -> Path:
    folder = settings.folder
    records = export.collect(results, settings.base_config())
    export.write_trials(folder / "trials.csv", records)
    front = export.pareto_front(records, settings.objectives)
    if not front:
        reasons = {record.error for record in records if record.error} or {"none was reported"}
        raise export.StudyError(
            f"no trial of study {settings.study!r} succeeded; errors: {'; '.join(reasons)}. "
            f"See {folder / 'trials.csv'} and {folder / RAY_FOLDER}; mend the cause and --resume."
        )
    export.write_pareto(folder / "pareto.json", front, settings.objectives)
    chosen = export.choose(records, front, settings.objectives)
    metrics = export.export_bundles(folder / "best", chosen, inputs, settings.study or "")
    summary.write_readme(
        folder / "README.md", settings, records, front, chosen, metrics, inputs.data.sha256
    )
    summary.print_summary(console, records, front, chosen, metrics, folder)
    return folder
