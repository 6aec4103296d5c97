"""The driver of a study: from its settings to its exports."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
import tyro
from ray import tune

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.errors import ConfigError, exit_on_error
from batchcam.export.bundle import check_writable
from batchcam.extras import MissingPackageError, require_extra
from batchcam.losses import TERMS, check_masks
from batchcam.models import create_model, feature_grid
from batchcam.provenance import command_line
from studies import paths
from studies.engine.ledger import LEDGER, Ledger
from studies.engine.ledger_callback import ERRORS
from studies.engine.replica import Replica
from studies.engine.retry import StorageLostError
from studies.engine.run import Search, Trainable, run_search
from studies.engine.storage import check_storage, copy_file, is_file
from studies.monitoring import wandb_workspace as dashboard
from studies.monitoring.console import console
from studies.monitoring.optuna_dashboard import attach_picture
from studies.monitoring.progress import on_terminal, print_engine_warnings
from studies.monitoring.wandb_runs import Tracking, choose_mode
from studies.outcome import export, export_tasks, summary
from studies.outcome.confirm import Confirmed, best_of_front, confirm
from studies.planning.devices import trial_device
from studies.planning.forecast import forecast, print_forecast, sample_configs
from studies.planning.probe import Probe
from studies.planning.probing import probe_all, probe_configs
from studies.planning.ray_cluster import connect, errors_of_tasks
from studies.planning.resources import (
    TrialResources,
    alive_nodes,
    choose_resources,
    cluster_device,
    slots,
)
from studies.settings import StudySettings
from studies.space import SearchSpace, Strides, feasible_strides, first_points, point_of, suggest
from studies.trial import TrialSettings, run_trial


def main(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run a study from a command line; exit with status 2 after an error that the user can correct.

    Args:
        argv: the arguments; None: those of this process.
        program: the name of the program in its help; None: that of this process.
    """
    name = None
    try:
        with exit_on_error(StorageLostError):
            settings = tyro.cli(StudySettings, args=argv, prog=program).named()
            name = settings.study
            run_study(settings)
    except KeyboardInterrupt:
        print(f"interrupted; resume with --study {name} --resume", file=sys.stderr)
        sys.exit(130)


def run_study(settings: StudySettings) -> Path:
    """Run or resume a study, export its best trials, and return its folder.

    Raises:
        BatchCamError: the settings, the data or the folder cannot be used, or no trial succeeded.
        StorageLostError: the storage could not be written to, for longer than the engine retries.
    """
    print_engine_warnings()
    settings = _resumed(settings) if settings.resumes else _begun(settings)
    prepared = prepare(settings.base_config())
    strides = feasible_strides(settings.space, prepared.dataset.channels)
    check_masks((TERMS[name] for name in settings.space.switched), prepared.dataset)
    _compute_ahead(prepared, settings.space, strides)
    if settings.pretrained:  # Fail now rather than in every trial.
        for backbone in settings.space.backbones:
            create_model(backbone, pretrained=True)
    search = _search(settings, strides)
    mode, reason = choose_mode()

    connect(settings.address)
    try:
        probes = _probe(settings, prepared, strides)
        resources = _resources(settings, probes, _trials_left(settings))
        trial_device(settings.base_config(), resources.gpus)  # Refuses fp16 without GPUs.
        if settings.dry_run:
            configs = sample_configs(settings, strides, settings.num_trials)
            result = forecast(settings, configs, probes, prepared, slots(alive_nodes(), resources))
            print_forecast(console, settings, probes, resources, result)
            return settings.folder
        _save(settings)
        console.print(
            f"Study {settings.study}: {settings.num_trials} trials of up to "
            f"{settings.max_epochs} epochs on {settings.dataset}, {resources.cpus:g} CPU and "
            f"{resources.gpus:g} GPU each; W&B {mode} ({reason})"
        )
        _warn_of_no_report(settings.folder)
        message = dashboard.begin(settings, mode)
        if message:
            console.print(message)
        tracking = Tracking(settings.wandb_project, settings.study or "", settings.folder, mode)
        # In the object store once; trials and exports map it.
        shared = ray.put(prepared)

        def trainable(resources: TrialResources) -> Trainable:
            trial_settings = TrialSettings(
                settings.base_config(), resources, settings.checkpoints, tracking
            )
            bound: Trainable = tune.with_parameters(
                run_trial, settings=trial_settings, prepared=shared
            )
            return bound

        ledger = run_search(
            search,
            settings.folder,
            trainable(resources),
            resources.request,
            lambda: slots(alive_nodes(), resources),
            progress=on_terminal(search),
            copy=settings.replica_of(settings.folder / paths.MEMORY),
            on_trial_end=partial(attach_picture, settings=settings),
        )
        make = partial(
            export_tasks.make_bundles,
            prepared=shared,
            study=settings.study or "",
            command=command_line(),
            resources=resources,
        )
        _export(
            settings,
            ledger,
            trainable,
            partial(_resources, settings, probes),
            make,
            prepared.dataset.sha256,
        )
        return settings.folder
    finally:
        ray.shutdown()


def _resumed(settings: StudySettings) -> StudySettings:
    """Return the settings of the study to resume, which may be in its storage only."""
    file = settings.folder / paths.SETTINGS
    replica = settings.replica_of(file)
    if replica is not None and not file.exists() and is_file(replica):
        copy_file(replica, str(file))  # The study began on another machine.
    return settings.resumed()


def _begun(settings: StudySettings) -> StudySettings:
    """Return the settings of a new study; refuse a name or folders that cannot be used."""
    _check_new(settings)
    if not settings.dry_run:
        check_writable(settings.folder)
        if settings.storage is not None:
            check_storage(settings.checkpoints)
    return settings.begun()


def _save(settings: StudySettings) -> None:
    """Write study.json, and its replica; from here on the study can be resumed."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    settings.save()
    file = settings.folder / paths.SETTINGS
    replica = settings.replica_of(file)
    if replica is not None:
        copy_file(str(file), replica)


def _trials_left(settings: StudySettings) -> int:
    """Return how many trials of the study are still to run, at least 1."""
    ledger = settings.folder / LEDGER
    place = settings.replica_of(settings.folder / paths.MEMORY)
    if settings.resumes and place is not None and not ledger.exists():
        Replica(settings.folder, place)  # Restores it; the study began on another machine.
    return max(1, settings.num_trials - Ledger(ledger).num_final)


def _resources(settings: StudySettings, probes: Sequence[Probe], trials: int) -> TrialResources:
    """Return what each of `trials` requests: the user's choice, or enough for the largest probe."""
    fractions = [each.peak_bytes / each.device_bytes for each in probes if each.error is None]
    return choose_resources(
        alive_nodes(),
        settings.cpus_per_trial,
        settings.gpus_per_trial,
        max(fractions, default=None),
        trials,
    )


def _export(
    settings: StudySettings,
    ledger: Ledger,
    trainable: Callable[[TrialResources], Trainable],
    resources: Callable[[int], TrialResources],
    make: export.MakeBundles,
    sha256: str,
) -> None:
    """Write tables, bundles, README.md and report.html; train the best again if that is asked.

    report.html is left out, and the reason is printed, if the extra `report` is not installed.

    Args:
        settings: of the study.
        ledger: its trials.
        trainable: what trains a trial with given resources.
        resources: what each of so many trials requests.
        make: makes the bundles of trials.
        sha256: digest of the data set.
    """
    records, front = _write_tables(settings, ledger)
    chosen = export.choose(records, front, settings.objective_records)
    confirmed: list[Confirmed] = []
    if settings.confirm:
        best = best_of_front(front, chosen, settings.objective_records, settings.confirm)
        console.print(f"Confirming {len(best)} trials with {settings.seeds} seeds each")
        enough = resources(len(best) * settings.seeds)
        confirmed = confirm(settings, best, trainable(enough), enough)
        means = [each.as_record for each in confirmed]
        chosen = export.choose(means, means, settings.objective_records)
    metrics = export.export_bundles(settings.folder / paths.BUNDLES, chosen, make)
    outcome = summary.Outcome(
        settings.objective_records, records, front, confirmed, chosen, metrics
    )
    try:
        console.print(f"Report: {_report_writer()(settings.folder)}", soft_wrap=True)
    except MissingPackageError as error:
        console.print(f"no report: {error}", soft_wrap=True, markup=False)
    summary.write_readme(settings.folder / paths.README, settings, outcome, sha256)
    summary.print_summary(console, outcome, settings.folder)


def _report_writer() -> Callable[[Path], Path]:
    """Return the function that writes a folder's report.

    Raises:
        MissingPackageError: the extra `report` is not installed.
    """
    with require_extra("report", paths.REPORT):
        from studies.outcome.report.page import write
    return write


def _warn_of_no_report(folder: Path) -> None:
    """Print a line if the extra `report` is not installed, without which a study still runs."""
    try:
        _report_writer()
    except MissingPackageError as error:
        console.print(
            f"no report will be written: {error} Then, or after the study: "
            f"batchcam-study report {folder}",
            soft_wrap=True,
            markup=False,
        )


def _check_new(settings: StudySettings) -> None:
    """Refuse to overwrite a study."""
    if (settings.folder / paths.SETTINGS).is_file():
        raise ConfigError(
            f"study {settings.study!r} exists in {settings.folder.parent}; resume it with "
            "--resume, or choose another name."
        )
    replica = settings.replica_of(settings.folder / paths.SETTINGS)
    if replica is not None and is_file(replica):
        raise ConfigError(
            f"study {settings.study!r} exists in {settings.storage}; resume it with --resume, or "
            "choose another name."
        )


def _compute_ahead(prepared: PreparedData, space: SearchSpace, strides: Strides) -> None:
    """Compute once what all trials need: the ceiling of every grid, and the supports."""
    channels = prepared.dataset.channels
    grids = [
        (resolution, feature_grid(backbone, resolution, channels, stride))
        for (backbone, resolution), options in strides.items()
        for stride in options
    ]
    supports = any(TERMS[name].uses_supports for name in space.switched)
    prepared.compute_ahead(grids, supports=supports)


def _probe(settings: StudySettings, prepared: PreparedData, strides: Strides) -> list[Probe]:
    """Measure a trial of each backbone, resolution and stride, unless its resources are given."""
    cpus, gpus = settings.cpus_per_trial, settings.gpus_per_trial
    device = "cpu" if gpus == 0 else cluster_device(alive_nodes())
    requested = cpus if device == "cpu" else gpus
    if requested is not None and not settings.dry_run:
        return []
    whole_gpus = 1.0 if device == "cuda" else 0.0
    base = settings.base_config()
    base = replace(base, device=trial_device(base, whole_gpus))
    configs = list(probe_configs(base, settings.space, strides))
    with errors_of_tasks():
        return probe_all(configs, prepared, cpus or 1.0, whole_gpus)


def _search(settings: StudySettings, strides: Strides) -> Search:
    warm = [
        point_of(TrialConfig.from_yaml(bundle / "config.yaml"), settings.space, strides)
        for bundle in settings.warm_start
        # On resume, Optuna's study holds the points, so that bundles may have been moved.
        if bundle.exists() or not settings.resumes
    ]
    return Search(
        name=settings.optuna_name,
        key=settings.key,
        space=partial(suggest, space=settings.space, strides=strides),
        first_points=[*first_points(settings.space), *warm],
        objectives=settings.objective_records,
        min_epochs=settings.min_epochs,
        max_epochs=settings.max_epochs,
        num_trials=settings.num_trials,
        max_failures=settings.max_failures,
        seed=settings.seed,
    )


def _write_tables(
    settings: StudySettings, ledger: Ledger
) -> tuple[list[export.TrialRecord], list[export.TrialRecord]]:
    """Write trials.csv and pareto.json; return all trials, and the Pareto front."""
    folder = settings.folder
    records = export.collect(ledger, settings.base_config(), settings.checkpoints)
    export.write_trials(folder / paths.TRIALS, records)
    front = export.pareto_front(records, settings.objective_records)
    if not front:
        reasons = {record.error for record in records if record.error} or {"none was reported"}
        raise export.StudyError(
            f"no trial of study {settings.study!r} succeeded; errors: {'; '.join(reasons)}. "
            f"See {folder / 'trials.csv'} and {folder / ERRORS}; correct the cause and --resume, "
            "or start another study."
        )
    export.write_pareto(folder / paths.PARETO, front, settings.objective_records)
    return records, front
