"""Run a search: propose, schedule, record and end trials on a Ray cluster that is connected.

The engine does not know what is trained. It searches over any trainable that keeps to
:mod:`studies.engine.protocol` and saves its own checkpoints under its `trial_id`.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from ray import tune

from batchcam.errors import ConfigError
from studies.engine.failures import Failures, memory_kills_end_trials_only
from studies.engine.ledger import LEDGER, Ledger
from studies.engine.ledger_callback import LedgerCallback
from studies.engine.optuna_searcher import OptunaSearcher, Space, enqueue
from studies.engine.optuna_storage import open_optuna_study
from studies.engine.protocol import (
    RESOURCE_MULTIPLIER,
    RESUMES_AT,
    TRIAL_ID,
    Objective,
    ResourceRequest,
    SearchStoppedError,
)
from studies.engine.recovery import recover
from studies.engine.replica import Replica
from studies.engine.sampler import ReproducibleTPE
from studies.engine.scheduler import ParetoASHA

Trainable = Callable[[dict[str, Any]], None]

Progress = Callable[[Ledger, int], AbstractContextManager[Sequence[tune.Callback]]]
"""Shows the progress of a search, from its ledger and the number of its trials in all.

The context lasts while trials run. It yields callbacks of Ray Tune, which learn of each event after
the event is recorded.
"""

_DRIVER_ENVIRONMENT = {
    # Seconds between two savings of Ray's own state, from which nothing is ever restored.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    # Ray's newer output cannot be silenced; the caller's `progress` prints what there is to say.
    "RAY_AIR_NEW_OUTPUT": "0",
    # The number of trials whose processes may start at the same time: the searcher limits it. With
    # Ray's default of one, trials start one after the other; where they are short, one runs alone.
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",
    # The ledger has the results; Ray would write each of them three times more.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Ray's handler would end the search as if it were complete, and advise to restore its state.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}

_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The definition of a search.

    Attributes:
        name: name of Optuna's study.
        key: prefix of the trials' ids; no other search that shares their storage may have it.
        space: draws a trial's parameters and returns its configuration.
        first_points: parameters to try before any others.
        objectives: at least one; the first one leads early stopping.
        min_epochs: epochs before a trial may be stopped early.
        max_epochs: epochs of a trial that is not stopped early.
        num_trials: the number of configurations to try in all.
        max_failures: how often a trial that fails continues from its last checkpoint.
        seed: seed of the sampler and the scheduler.

    Raises:
        ConfigError: there is no objective, or two have one name.
    """

    name: str
    key: str
    space: Space
    first_points: Sequence[Mapping[str, Any]] = ()
    objectives: tuple[Objective, ...]
    min_epochs: int
    max_epochs: int
    num_trials: int
    max_failures: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        names = [each.name for each in self.objectives]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"objectives={names} must be one or more, each of another name.")


def run_search(
    search: Search,
    folder: Path,
    trainable: Trainable,
    request: ResourceRequest,
    max_concurrent_trials: Callable[[], int],
    *,
    callbacks: Sequence[tune.Callback] = (),
    progress: Progress = lambda _ledger, _num_trials: nullcontext(()),
    copy: str | None = None,
    on_trial_end: Callable[[optuna.Trial], None] = lambda _: None,
) -> Ledger:
    """Run a search to its end, resuming it if `folder` holds a part of it; return its ledger.

    Args:
        search: the definition of the search.
        folder: the folder, which exists, for the ledger and Optuna's journal.
        trainable: runs one trial in a process of Ray; see :mod:`studies.engine.protocol`.
        request: returns the resources that a trial asks for.
        max_concurrent_trials: returns how many trials fit the cluster at present. One more is
            proposed, so that it starts as soon as another ends. A trial proposed earlier would be
            proposed with less knowledge.
        callbacks: callbacks of Ray Tune, which learn of each event after the event is recorded.
        progress: shows the progress; by default nothing is shown.
        copy: a folder or URI for a replica of ledger and journal, from which missing ones are
            restored; see :class:`studies.engine.replica.Replica`.
        on_trial_end: called with each of Optuna's trials before Optuna learns its end.

    Raises:
        ConfigError: the ledger is damaged, the storage's address is wrong, Optuna's study has
            other directions than the objectives, or a trial reported an unusable node.
        FormatError: the ledger has a newer format.
        StorageLostError: the ledger or Optuna's storage could not be written for a long time.
    """
    # It warns of the files that Ray was told not to write.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    # It lists the trials that failed at the end, also those that started again and completed.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    replicas = [] if copy is None else [Replica(folder, copy)]
    ledger = Ledger(folder / LEDGER)
    directions = [each.direction for each in search.objectives]
    study, storage = open_optuna_study(
        folder, search.name, directions, ReproducibleTPE(search.seed)
    )
    stored = [each.name.lower() for each in study.directions]
    if stored != directions:
        raise ConfigError(
            f"Optuna's study {search.name!r} has the directions {stored}, not {directions}; resume "
            "it with its own objectives, or give the search another name."
        )
    enqueue(study, search.first_points)

    def configure(trial: optuna.Trial) -> dict[str, Any]:
        history = ledger.get(trial.number)
        return {
            **search.space(trial),
            TRIAL_ID: trial_id(search.key, trial.number),
            RESOURCE_MULTIPLIER: history.resource_multiplier if history else 1,
            RESUMES_AT: history.epoch if history else 0,
        }

    def enlarge(number: int) -> int | None:
        history = ledger.get(number)  # Not by its index: a later trial may have started first.
        multiplier = 2 * (history.resource_multiplier if history else 1)
        if dict(request(multiplier)) == dict(request(multiplier // 2)):
            return None
        ledger.enlarge(number, multiplier)
        return multiplier

    def resources(params: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([dict(request(params[RESOURCE_MULTIPLIER]))])

    failures = Failures(search.max_failures, enlarge)
    scheduler = ParetoASHA(
        objectives=search.objectives,
        min_epochs=search.min_epochs,
        max_epochs=search.max_epochs,
        seed=search.seed,
        on_error=failures.judge,
    )
    searcher = OptunaSearcher(
        study,
        storage,
        configure,
        objectives=search.objectives,
        max_epochs=search.max_epochs,
        num_trials=search.num_trials,
        max_concurrent_trials=_recent(lambda: max_concurrent_trials() + 1, seconds=2),
        enlarge=enlarge,
        starts_again=lambda trial_id: failures.verdict(trial_id).starts_again,
        on_trial_end=on_trial_end,
    )
    recover(ledger, searcher, scheduler, search.max_epochs)
    with (
        _stoppable(),
        tempfile.TemporaryDirectory(prefix="batchcam-ray-") as scratch,
        _environment(),
        memory_kills_end_trials_only(),
        progress(ledger, searcher.num_trials) as shown,
    ):
        tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                num_samples=-1,
                search_alg=searcher,
                scheduler=scheduler,
                reuse_actors=True,
                trial_dirname_creator=_trial_folder,
            ),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=scratch,
                # A trial that starts again is another trial for Ray, which may be larger.
                failure_config=tune.FailureConfig(max_failures=0),
                callbacks=[
                    failures,
                    LedgerCallback(
                        ledger, folder, search.objectives, search.max_epochs, failures.verdict
                    ),
                    *replicas,
                    *shown,
                    *callbacks,
                ],
                verbose=0,
            ),
        ).fit()
    for replica in replicas:
        replica.flush()
    return ledger


@contextmanager
def _environment() -> Iterator[None]:
    """Set the variables that Ray reads, and hide the keys of object stores from Ray.

    Ray would pass the keys to trials, and write them to its logs on every node. Trials take them
    from the environment in which their node was started.
    """
    before = dict(os.environ)
    os.environ.update(_DRIVER_ENVIRONMENT)
    for name in _KEYS:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raise what a trial reported of an unusable node as an error of the user."""
    try:
        yield
    except SearchStoppedError as stopped:
        raise ConfigError(
            f"{stopped} Then resume the search: nothing that was recorded is lost."
        ) from None


def _recent(function: Callable[[], int], seconds: float) -> Callable[[], int]:
    """Return a function that caches the result of another one for some seconds."""
    value, due = 0, 0.0

    def recall() -> int:
        nonlocal value, due
        if time.monotonic() >= due:
            value, due = function(), time.monotonic() + seconds
        return value

    return recall


def trial_id(key: str, number: int) -> str:
    """Return the id of a trial, which names its checkpoints, its W&B run and its table row.

    Example:
        >>> trial_id("first", 3)
        'first_00003'
    """
    return f"{key}_{number:05d}"


def _trial_folder(trial: "tune.experiment.Trial") -> str:
    return str(trial.trial_id)
