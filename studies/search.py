"""The bridge to Optuna: which configuration to try next.

Optuna's study lives in a journal file beside the results, which Optuna Dashboard can open while the
study runs.
"""

from functools import partial
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.tune.search.optuna import OptunaSearch

from studies.space import SearchSpace, Strides, first_points, suggest

JOURNAL = "optuna.journal"


def make_search(
    space: SearchSpace,
    strides: Strides,
    objectives: tuple[str, ...],
    folder: Path,
    study_name: str,
    seed: int,
) -> OptunaSearch:
    """Return a searcher that maximises `objectives` with TPE and records to the study's journal."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(
        partial(suggest, space=space, strides=strides),
        metric=list(objectives),
        mode=["max"] * len(objectives),
        points_to_evaluate=first_points(space),
        sampler=optuna.samplers.TPESampler(seed=seed),
        study_name=study_name,
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
    )
