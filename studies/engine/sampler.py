"""Draw parameters so that the proposals of a study survive a crash.

Only public names of Optuna are used: TPE sees an in-memory study that holds the trials worth
knowing, instead of the study itself.
"""

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import moocore
import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

_KNOWN = 400
"""Maximum number of ended trials that TPE sees."""


_Key = tuple[str, int]
"""The name of a study and the number of a trial."""


class ReproducibleTPE(optuna.samplers.BaseSampler):
    """Optuna's TPE, whose draws depend on the seed, trial number, parameter and history only.

    An ordinary sampler carries a random state from trial to trial, and the state is lost with the
    process. Here each draw has its own generator, so a resumed study proposes the same values as an
    uninterrupted one.

    The cost of a TPE draw grows with the number of trials. To bound it, TPE sees the running trials
    and at most `_KNOWN` ended ones: the best and the latest.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known: tuple[_Key, optuna.Study] | None = None
        self._reduced: dict[_Key, FrozenTrial] = {}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return an empty space: the space is conditional, so each parameter is drawn by itself."""
        del study, trial
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return no values; see :meth:`infer_relative_search_space`."""
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
        # The known study does not hold the drawn trial, which must not be among its own evidence.
        # Its stand-in has the number -1, because TPE leaves out the trial of the same number.
        drawn = create_trial(state=TrialState.RUNNING)
        return sampler.sample_independent(
            self._known_study(study, trial.number), drawn, param_name, param_distribution
        )

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Do nothing: the sampler keeps no state that a trial's end could change."""
        del study, trial, state, values

    def _known_study(self, study: optuna.Study, number: int) -> optuna.Study:
        """Return the in-memory study that TPE sees while it draws this trial."""
        key = study.study_name, number
        if self._known is None or self._known[0] != key:
            known = optuna.create_study(
                storage=optuna.storages.InMemoryStorage(), directions=study.directions
            )
            # In the order of their numbers: TPE weighs trials by age.
            known.add_trials(
                self._reduce(study, trial)
                for trial in _worth_knowing(study)
                if trial.number != number
            )
            self._known = key, known
        return self._known[1]

    def _reduce(self, study: optuna.Study, trial: FrozenTrial) -> FrozenTrial:
        if trial.state == TrialState.RUNNING:
            return _KnownTrial(trial)
        key = study.study_name, trial.number
        if key not in self._reduced:
            self._reduced[key] = _KnownTrial(trial)
        return self._reduced[key]


class _KnownTrial(FrozenTrial):
    """The attributes of a trial that TPE reads. Cheap: hundreds are created per new trial.

    TPE reads the state, objectives, constraints, parameter values, and the intermediate values of a
    pruned trial. It does not read the distributions. Those given here accept any value: an enqueued
    point may lie outside the range of its parameter.
    """

    def __init__(self, trial: FrozenTrial) -> None:
        super().__init__(
            number=trial.number,
            trial_id=trial.number,
            state=trial.state,
            value=None,
            values=trial.values,
            datetime_start=trial.datetime_start,
            datetime_complete=trial.datetime_complete,
            params=trial.params,
            distributions={
                name: CategoricalDistribution((value,)) for name, value in trial.params.items()
            },
            user_attrs={},
            system_attrs={},
            intermediate_values=trial.intermediate_values,
        )
        self._constraint_values = trial.constraints

    @property
    def constraints(self) -> dict[str, float]:
        """Constraint values by name. Optuna's own property collects them at each access."""
        return self._constraint_values

    def __deepcopy__(self, memo: dict[int, Any]) -> "_KnownTrial":
        # A study copies each added trial. Nothing writes to a known one, so that its copy may share
        # the contents; a deep copy of all known trials takes longer than the draws.
        del memo
        return copy.copy(self)


def _worth_knowing(study: optuna.Study) -> list[FrozenTrial]:
    """Return the running trials, the best completed ones and the latest ended ones, in order."""
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    trials = study.get_trials(deepcopy=False, states=states)
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(ended) <= _KNOWN:
        return trials
    completed = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    kept: set[int] = set()
    if completed:
        values = np.array([trial.values for trial in completed], dtype=float)
        distinct, unique = np.unique(values, axis=0, return_inverse=True)
        up = [each == optuna.study.StudyDirection.MAXIMIZE for each in study.directions]
        ranks = moocore.pareto_rank(distinct, maximise=up)[unique.ravel()]
        best = np.argsort(ranks, kind="stable")[: _KNOWN // 2]
        kept = {completed[index].number for index in best}
    latest = [trial.number for trial in ended if trial.number not in kept]
    kept |= set(latest[len(kept) - _KNOWN :])
    return [trial for trial in trials if trial.state == TrialState.RUNNING or trial.number in kept]
