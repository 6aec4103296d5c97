"""Confirm before believing: the best of a study, trained again with fresh seeds on the full budget.

A study's best was chosen among many, by one run each, some of them stopped early: part of what
makes it best is chance. Here the K best of the front are trained anew S times, the seeds unlike the
study's, and the winner is chosen by their means.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
import optuna
from scipy.stats import t as student_t

from studies.engine.ledger_callback import ERRORS
from studies.engine.run import Search, Trainable, run_search
from studies.outcome.export import StudyError, TrialRecord, collect
from studies.planning.resources import TrialResources
from studies.settings import MEMORY, StudySettings

FOLDER = "confirm"
"""Where, in the study's folder, the confirming runs have their ledger."""

CANDIDATE = "candidate"
"""In a run's parameters: the id of the trial that it confirms."""

_LEVEL = 0.95
_FIRST_SEED = 1_000
"""Added to the study's seed: far from what a person would count through."""

_CONFIRMED = ("val_accuracy", "cam_ssim", "images_per_second")


@dataclass(frozen=True)
class Confirmed:
    """A candidate and its fresh runs.

    Attributes:
        candidate: the trial of the study.
        runs: one per seed, each on the full budget.
        intervals: for each metric its mean and the bounds of the 95 % confidence interval of the
            mean, by Student's t over the seeds.
    """

    candidate: TrialRecord
    runs: list[TrialRecord]
    intervals: dict[str, tuple[float, float, float]]

    @property
    def as_record(self) -> TrialRecord:
        """The candidate with the means for metrics, and the first run's checkpoints.

        The first, not the best of the runs: choosing among them would be chance once more.
        """
        run = self.runs[0]
        means = {name: values[0] for name, values in self.intervals.items()}
        return TrialRecord(
            trial_id=run.trial_id,
            state=run.state,
            config=run.config,
            metrics={**run.metrics, **means},
            checkpoints=run.checkpoints,
            facts=self.facts,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What a bundle's metrics.json says of it."""
        return {
            "confirmed": {
                "candidate": self.candidate.trial_id,
                "seeds": [run.config.seed for run in self.runs],
                "level": _LEVEL,
                **{
                    name: dict(zip(("mean", "low", "high"), values, strict=True))
                    for name, values in self.intervals.items()
                },
            }
        }


def best_of_front(
    front: Sequence[TrialRecord], chosen: dict[str, TrialRecord], objectives: Sequence[str], k: int
) -> list[TrialRecord]:
    """Return the `k` best of a front: those chosen first, then the nearest to the ideal point.

    The baseline, if there is one, is confirmed besides: what they gain is as uncertain as it is.
    Distances are Euclidean, each objective in units of its range on the front.
    """
    values = np.array([[record.metrics[name] for name in objectives] for record in front])
    distance = np.linalg.norm(
        (values.max(axis=0) - values) / (np.ptp(values, axis=0) + 1e-12), axis=1
    )
    nearest = [front[index] for index in np.argsort(distance, kind="stable")]
    first = [chosen[name] for name in ("knee", "accuracy", "ssim")]
    order: list[TrialRecord] = []
    for record in [*first, *nearest]:
        if record not in order:
            order.append(record)
    best = order[:k]
    baseline = chosen.get("baseline")
    return best if baseline is None or baseline in best else [*best, baseline]


def confirming_search(
    settings: StudySettings, candidates: Sequence[TrialRecord], seeds: int
) -> Search:
    """Return a search whose trials are each candidate with each fresh seed, none stopped early."""
    runs = [(record, seed) for seed in range(seeds) for record in candidates]

    def space(trial: optuna.Trial) -> dict[str, Any]:
        record, seed = runs[trial.suggest_int("run", 0, len(runs) - 1)]
        fresh = settings.seed + _FIRST_SEED + seed
        return {**record.config.as_dict(), "seed": fresh, CANDIDATE: record.trial_id}

    return Search(
        name=f"{settings.optuna_name}-confirm-{digest(candidates, seeds)}",
        key=f"{settings.key}c{digest(candidates, seeds)}",
        space=space,
        first_points=[{"run": run} for run in range(len(runs))],
        objectives=settings.objectives,
        min_epochs=settings.max_epochs,
        max_epochs=settings.max_epochs,
        num_trials=len(runs),
        max_failures=settings.max_failures,
        seed=settings.seed,
    )


def confirm(
    settings: StudySettings,
    candidates: Sequence[TrialRecord],
    trainable: Trainable,
    resources: TrialResources,
) -> list[Confirmed]:
    """Train each candidate with fresh seeds, going on with what was cut, and return the outcome.

    Raises:
        StudyError: no candidate came to the end with two seeds.
    """
    folder = settings.folder / FOLDER / digest(candidates, settings.seeds)
    folder.mkdir(parents=True, exist_ok=True)
    search = confirming_search(settings, candidates, settings.seeds)
    memory = settings.copy_of(folder / MEMORY)
    ledger = run_search(search, folder, trainable, resources, copy=memory)
    of = {trial.params["trial_id"]: trial.params[CANDIDATE] for trial in ledger.trials}
    runs = collect(ledger, settings.base_config(), settings.checkpoints)
    confirmed = gather(candidates, [(of[run.trial_id], run) for run in runs])
    if not confirmed:
        raise StudyError(
            f"none of the {len(candidates)} candidates came to the end with two seeds; see "
            f"{folder / ERRORS}, mend the cause and --resume."
        )
    return confirmed


def digest(candidates: Sequence[TrialRecord], seeds: int) -> str:
    """Return a name for the confirmation of these, as the front of a study may yet change."""
    ids = " ".join([str(seeds), *(record.trial_id for record in candidates)])
    return hashlib.sha256(ids.encode()).hexdigest()[:4]


def gather(
    candidates: Sequence[TrialRecord], runs: Sequence[tuple[str, TrialRecord]]
) -> list[Confirmed]:
    """Return the candidates of which two runs came to the end; runs are (candidate's id, run)."""
    found = []
    for candidate in candidates:
        own = [run for of, run in runs if of == candidate.trial_id and run.state == "completed"]
        if len(own) > 1:
            intervals = {name: interval([run.metrics[name] for run in own]) for name in _CONFIRMED}
            found.append(Confirmed(candidate, own, intervals))
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of values, and the bounds of its 95 % confidence interval.

    By Student's t with n - 1 degrees of freedom.

    Raises:
        StatisticsError: there are fewer than two values.
    """
    centre = mean(values)
    factor = float(student_t.ppf((1 + _LEVEL) / 2, len(values) - 1))
    half = factor * stdev(values) / math.sqrt(len(values))
    return centre, centre - half, centre + half
