"""A sampler whose choices survive a crash."""

import zlib
from collections.abc import Container, Sequence
from typing import Any

import moocore
import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

_KNOWN = 400
"""Trials that have ended, of which the sampler is told."""


class ReproducibleTPE(optuna.samplers.BaseSampler):
    """Optuna's TPE, whose draws depend on the seed, the trial, the parameter, and what is known.

    An ordinary sampler carries a random state from trial to trial, which dies with the process.
    Here each draw has a generator of its own: a study that was resumed proposes what it would have.

    TPE goes through all that is known for each parameter of each trial. So that the two-thousandth
    is proposed as fast as the five-hundredth, it is shown those that run and at most `_KNOWN` that
    have ended: the best, and the latest.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._view: tuple[int, _View] | None = None

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return none: the space is conditional, each parameter is drawn by itself."""
        del study, trial
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return none; see :meth:`infer_relative_search_space`."""
        del study, trial, search_space
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter with TPE."""
        entropy = (self._seed, trial.number, zlib.crc32(param_name.encode()))
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=False)
        if self._view is None or self._view[0] != trial.number:
            self._view = trial.number, _View(study, _worth_knowing(study))
        return sampler.sample_independent(self._view[1], trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Do nothing: what there is to know is in the storage."""
        del study, trial, state, values


class _View(optuna.Study):
    """A study of which only some trials are seen."""

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self.__dict__.update(study.__dict__)
        self._seen = trials

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        del deepcopy, use_cache
        return [trial for trial in self._seen if states is None or trial.state in states]


def _worth_knowing(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that run, the best that were completed, and the latest of the others."""
    trials = study.get_trials(deepcopy=False)
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(ended) <= _KNOWN:
        return trials
    completed = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    kept: set[int] = set()
    if completed:
        values = np.array([trial.values for trial in completed], dtype=float)
        _, unique = np.unique(values, axis=0, return_inverse=True)
        distinct = np.unique(values, axis=0)
        up = [each == optuna.study.StudyDirection.MAXIMIZE for each in study.directions]
        ranks = moocore.pareto_rank(distinct, maximise=up)[unique.ravel()]
        best = np.argsort(ranks, kind="stable")[: _KNOWN // 2]
        kept = {completed[index].number for index in best}
    latest = [trial.number for trial in ended if trial.number not in kept]
    kept |= set(latest[len(kept) - _KNOWN :])
    return [trial for trial in trials if trial.state == TrialState.RUNNING or trial.number in kept]
