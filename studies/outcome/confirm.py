"""Confirmation: train the best trials of a study again with fresh seeds on the full budget.

A study's best trial was chosen among many, by one run each, some of them stopped early: part of its
lead is chance. Here the K best of the front are trained again S times with seeds that the study did
not use, and the winner is chosen by the means.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from studies import paths
from studies.engine.ledger_callback import ERRORS
from studies.engine.protocol import TRIAL_ID, Objective, gains
from studies.engine.run import Search, Trainable, run_search
from studies.monitoring.progress import on_terminal
from studies.objectives import OBJECTIVES
from studies.outcome.export import BASELINE, KNEE, StudyError, TrialRecord, collect
from studies.planning.resources import TrialResources, alive_nodes, slots
from studies.settings import StudySettings
from studies.statistics import LEVEL, mean_interval

CANDIDATE = "candidate"
"""In a run's parameters: the id of the trial that the run confirms."""

_FIRST_SEED = 1_000
"""Offset of the fresh seeds to the study's seed, beyond the seeds that users count through."""


@dataclass(frozen=True)
class Confirmed:
    """A candidate and its fresh runs.

    Attributes:
        candidate: the trial of the study.
        runs: one run per seed, each on the full budget.
        intervals: for each metric that can be an objective, the mean and the bounds of its 95 %
            confidence interval, by Student's t over the seeds.
    """

    candidate: TrialRecord
    runs: list[TrialRecord]
    intervals: dict[str, tuple[float, float, float]]

    @property
    def as_record(self) -> TrialRecord:
        """The first run with the means as its metrics.

        The first run, not the best: choosing the best would select by chance again.
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
        """The entries of metrics.json about the confirmation."""
        return {
            "confirmed": {
                "candidate": self.candidate.trial_id,
                "seeds": [run.config.seed for run in self.runs],
                "level": LEVEL,
                **{
                    name: dict(zip(("mean", "low", "high"), values, strict=True))
                    for name, values in self.intervals.items()
                },
            }
        }


def best_of_front(
    front: Sequence[TrialRecord],
    chosen: Mapping[str, TrialRecord],
    objectives: Sequence[Objective],
    k: int,
) -> list[TrialRecord]:
    """Return the `k` best of a front, and the baseline.

    The first of the best are those chosen: the knee, then the best by each objective. The records
    nearest to the ideal point follow. Distances are Euclidean, each objective in units of its range
    on the front. The baseline is confirmed too, if there is one, since a gain over it is as
    uncertain as its own value.
    """
    values = gains([record.metrics for record in front], objectives)
    distance = np.linalg.norm(
        (values.max(axis=0) - values) / (np.ptp(values, axis=0) + 1e-12), axis=1
    )
    nearest = [front[index] for index in np.argsort(distance, kind="stable")]
    first = [chosen[name] for name in (KNEE, *(each.short for each in objectives))]
    order: list[TrialRecord] = []
    for record in [*first, *nearest]:
        if record not in order:
            order.append(record)
    best = order[:k]
    baseline = chosen.get(BASELINE)
    return best if baseline is None or baseline in best else [*best, baseline]


def confirming_search(
    settings: StudySettings, candidates: Sequence[TrialRecord], seeds: int
) -> Search:
    """Return a search over each candidate with each fresh seed, without early stopping."""
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
        objectives=settings.objective_records,
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
    """Train each candidate with fresh seeds, resuming interrupted runs; return the outcome.

    Raises:
        StudyError: no candidate has two completed runs.
    """
    folder = settings.folder / paths.CONFIRM / digest(candidates, settings.seeds)
    folder.mkdir(parents=True, exist_ok=True)
    search = confirming_search(settings, candidates, settings.seeds)
    memory = settings.replica_of(folder / paths.MEMORY)
    ledger = run_search(
        search,
        folder,
        trainable,
        resources.request,
        lambda: slots(alive_nodes(), resources),
        progress=on_terminal(search),
        copy=memory,
    )
    of = {trial.params[TRIAL_ID]: trial.params[CANDIDATE] for trial in ledger.trials}
    runs = collect(ledger, settings.base_config(), settings.checkpoints)
    confirmed = gather(candidates, [(of[run.trial_id], run) for run in runs])
    if not confirmed:
        raise StudyError(
            f"none of the {len(candidates)} candidates has two completed runs; see "
            f"{folder / ERRORS}, fix the cause and --resume."
        )
    return confirmed


def digest(candidates: Sequence[TrialRecord], seeds: int) -> str:
    """Return a name for the confirmation of these candidates; other fronts have other names."""
    ids = " ".join([str(seeds), *(record.trial_id for record in candidates)])
    return hashlib.sha256(ids.encode()).hexdigest()[:4]


def gather(
    candidates: Sequence[TrialRecord], runs: Sequence[tuple[str, TrialRecord]]
) -> list[Confirmed]:
    """Return the candidates with two or more completed runs; runs are (candidate's id, run)."""
    found = []
    for candidate in candidates:
        own = [run for of, run in runs if of == candidate.trial_id and run.state == "completed"]
        if len(own) > 1:
            intervals = {
                name: mean_interval([run.metrics[name] for run in own]) for name in OBJECTIVES
            }
            found.append(Confirmed(candidate, own, intervals))
    return found
