"""Trials from proposal to end, on a Ray cluster that is there: what a study does, and no more.

What is trained is not its affair: any function that reports `epoch` and the objectives, and keeps
its own checkpoints under the `trial_id` it is given, can be searched over. So the same engine runs
real studies, and the trials without a model that its tests and benchmarks are made of.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from ray import tune

from studies.engine.ledger import LEDGER, Ledger
from studies.engine.ledger_callback import LedgerCallback
from studies.engine.optuna_searcher import OptunaSearcher, Space, enqueue
from studies.engine.optuna_storage import open_optuna_study
from studies.engine.recovery import recover
from studies.engine.replica import Replica
from studies.engine.sampler import ReproducibleTPE
from studies.engine.scheduler import ParetoASHA
from studies.monitoring.console import TrialLines, console
from studies.monitoring.status_table import StatusTable, shown
from studies.planning.resources import TrialResources, slots
from studies.trial import RESOURCE_MULTIPLIER, RESUMES_AT

Trainable = Callable[[dict[str, Any]], None]

_DRIVER_ENVIRONMENT = {
    # Seconds between two savings of Ray's own state, from which nothing is ever restored.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    # Ray's newer output cannot be silenced; `studies.monitoring.console` says what there is to say.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Trials whose processes may start at the same time: as many as the bridge gives. Ray's default
    # of one would start slot after slot, and never the second where trials are short.
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",
    # The ledger has the results; Ray would write each of them three times more.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Its handler would end the search as if it were done, and advise to restore from its state.
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
    """What is searched, and how.

    Attributes:
        name: of Optuna's study.
        key: what the trials' ids begin with, as no other study's do.
        space: draws a trial's parameters and returns its configuration.
        first_points: parameters to try before any others.
        objectives: metrics to maximise.
        min_epochs: epochs before a trial may be stopped early.
        max_epochs: epochs of a trial that is not.
        num_trials: configurations to try in all.
        max_failures: how often a trial that fails goes on from its last checkpoint.
        seed: of the sampler and the scheduler.
    """

    name: str
    key: str
    space: Space
    first_points: Sequence[Mapping[str, Any]] = ()
    objectives: tuple[str, ...]
    min_epochs: int
    max_epochs: int
    num_trials: int
    max_failures: int = 2
    seed: int = 0


def run_search(
    search: Search,
    folder: Path,
    trainable: Trainable,
    resources: TrialResources,
    callbacks: Sequence[tune.Callback] = (),
    copy: str | None = None,
    on_trial_end: Callable[[optuna.Trial], None] = lambda _: None,
) -> Ledger:
    """Run a search to its end, going on with what `folder` holds of it; return its ledger.

    Args:
        search: what is searched, and how.
        folder: where its memory is kept.
        trainable: what runs for each trial.
        resources: what a trial asks for.
        callbacks: hear of each event after it is recorded.
        copy: a folder or URI for a copy of the memory, from which `folder` is made where it is
            lost; see :class:`studies.engine.replica.Replica`.
        on_trial_end: called with each of Optuna's trials before its end is told.

    Raises:
        ConfigError: the ledger is damaged, or the storage's address is wrong.
        StorageLostError: the ledger or Optuna's storage could not be written for a long time.
    """
    # It misses the files that Ray was told not to write.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    replicas = [] if copy is None else [Replica(folder, copy)]
    ledger = Ledger(folder / LEDGER)
    study, storage = open_optuna_study(
        folder, search.name, len(search.objectives), ReproducibleTPE(search.seed)
    )
    enqueue(study, search.first_points)

    def configure(trial: optuna.Trial) -> dict[str, Any]:
        history = ledger.get(trial.number)
        return {
            **search.space(trial),
            "trial_id": trial_id(search.key, trial.number),
            RESOURCE_MULTIPLIER: history.resource_multiplier if history else 1,
            RESUMES_AT: history.epoch if history else 0,
        }

    def enlarge(number: int) -> int | None:
        history = ledger.get(number)  # Not by its place: a later trial may have started first.
        share = 2 * (history.resource_multiplier if history else 1)
        if resources.enlarged(share) == resources.enlarged(share // 2):
            return None
        ledger.enlarge(number, share)
        return share

    scheduler = ParetoASHA(
        objectives=search.objectives,
        min_epochs=search.min_epochs,
        max_epochs=search.max_epochs,
        seed=search.seed,
    )
    bridge = OptunaSearcher(
        study,
        storage,
        configure,
        objectives=search.objectives,
        max_epochs=search.max_epochs,
        num_trials=search.num_trials,
        max_concurrent_trials=_recent(lambda: slots(resources) + 1, seconds=2),
        enlarge=enlarge,
        on_trial_end=on_trial_end,
    )
    recover(ledger, bridge, scheduler, search.max_epochs)
    ended = sum(trial.state is not None for trial in ledger.trials)
    table = StatusTable(ledger, bridge.num_trials, search.objectives, search.max_epochs)
    with (
        tempfile.TemporaryDirectory(prefix="batchcam-ray-") as scratch,
        _environment(),
        shown(console, table),
    ):
        tune.Tuner(
            tune.with_resources(
                trainable, lambda params: resources.enlarged(params[RESOURCE_MULTIPLIER]).as_ray()
            ),
            tune_config=tune.TuneConfig(
                num_samples=-1,
                search_alg=bridge,
                scheduler=scheduler,
                reuse_actors=True,
                trial_dirname_creator=_trial_folder,
            ),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=search.max_failures),
                callbacks=[
                    LedgerCallback(ledger, folder, search.objectives, search.max_epochs),
                    *replicas,
                    TrialLines(bridge.num_trials, ended),
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
    """Set what Ray reads from the environment, and keep the keys of object stores from it.

    Ray would hand these to trials, and write them to its logs on every node; trials have them from
    the environment that their node was started with.
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


def _recent(function: Callable[[], int], seconds: float) -> Callable[[], int]:
    """Return a function that calls another one at most once in so many seconds."""
    value, due = 0, 0.0

    def recall() -> int:
        nonlocal value, due
        if time.monotonic() >= due:
            value, due = function(), time.monotonic() + seconds
        return value

    return recall


def trial_id(key: str, number: int) -> str:
    """Return the id of a trial: of its checkpoints, its W&B run, and its row in the tables."""
    return f"{key}_{number:05d}"


def _trial_folder(trial: "tune.experiment.Trial") -> str:
    return str(trial.trial_id)
