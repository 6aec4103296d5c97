"""TPE whose draws are reproducible after a crash."""

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import moocore
import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

_KNOWN = 400
"""Ended trials that TPE is shown at most."""


class ReproducibleTPE(optuna.samplers.BaseSampler):
    """Optuna's TPE with draws that depend only on seed, trial number, parameter name and history.

    An ordinary sampler carries a random state from trial to trial, which is lost with the process.
    Here each draw has a random generator of its own, so a resumed study proposes what it would
    have proposed without the interruption.

    TPE reads the whole history for each parameter of each trial. To propose the 2,000th trial as
    fast as the 500th, it is shown at most `_KNOWN` ended trials: the best, and the latest.

    Args:
        seed: of all draws.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._shown: tuple[int, optuna.Study] | None = None

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return none: the space is conditional, so each parameter is drawn independently."""
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
        tpe = optuna.samplers.TPESampler(seed=seed, multivariate=False)
        if self._shown is None or self._shown[0] != trial.number:
            self._shown = trial.number, _in_memory(study, trial)
        # TPE ignores the trial that it draws for, by its number. The trials in memory are numbered
        # from 0; this trial is none of them.
        other = copy.copy(trial)
        other.number = -1
        return tpe.sample_independent(self._shown[1], other, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Do nothing: the storage holds the whole history."""
        del study, trial, state, values


def _in_memory(study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
    """Return a study in memory that holds the trials that TPE is to learn from, in their order."""
    shown = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(), directions=study.directions
    )
    known = _worth_knowing(study)
    shown.add_trials([each for each in known if each.number != trial.number])
    return shown


def _worth_knowing(study: optuna.Study) -> list[FrozenTrial]:
    """Return the running trials, the best completed ones, and the latest other ended ones."""
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    trials = study.get_trials(deepcopy=False, states=states)
    ended = [each for each in trials if each.state != TrialState.RUNNING]
    if len(ended) <= _KNOWN:
        return trials
    completed = [each for each in ended if each.state == TrialState.COMPLETE]
    kept: set[int] = set()
    if completed:
        values = np.array([each.values for each in completed], dtype=float)
        distinct, row = np.unique(values, axis=0, return_inverse=True)
        up = [each == optuna.study.StudyDirection.MAXIMIZE for each in study.directions]
        ranks = moocore.pareto_rank(distinct, maximise=up)[row.ravel()]
        best = np.argsort(ranks, kind="stable")[: _KNOWN // 2]
        kept = {completed[index].number for index in best}
    latest = [each.number for each in ended if each.number not in kept]
    kept |= set(latest[len(kept) - _KNOWN :])
    return [each for each in trials if each.state == TrialState.RUNNING or each.number in kept]
