"""The bridge to Optuna: proposes configurations, and reports the final state of each trial.

Ray's own `OptunaSearch` reports a trial that was stopped early as complete, forgets trials that a
crash interrupted, and drops values that are not numbers. Here Optuna's storage is the authoritative
record of trial states: COMPLETE reached its last epoch, PRUNED was stopped early, FAIL failed or
diverged, RUNNING is running or will be resumed with the study.
"""

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from studies.engine.ledger import State
from studies.engine.optuna_internals import StoredTrials
from studies.engine.optuna_storage import STORAGE_ERRORS
from studies.engine.protocol import EPOCH, NUMBER, OUT_OF_MEMORY, Objective, has_objectives
from studies.engine.retry import retry

Space = Callable[[optuna.Trial], dict[str, Any]]

EPOCHS_MISSING = "epochs_missing"
"""Name of the constraint by which a sampler of several objectives ranks trials stopped early."""

_WHAT = "Optuna's storage"
_RETRY_OF = "retry_of"

_IN_OPTUNA: dict[State, TrialState] = {
    "completed": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


class OptunaSearcher(Searcher):
    """Proposes trials from an Optuna study, and reports their final states to it.

    Trials that are RUNNING in the storage when a study begins were cut by a crash: they are
    proposed first, with the values they had. The study's numbers are the trials' names; Ray's ids
    are not kept.

    With several objectives Optuna's own interface takes no intermediate values, and its TPE fails
    on trials that were pruned with some. They are written to the storage all the same, those of the
    first objective, and a pruned trial carries the number of its missing epochs as a constraint,
    which TPE ranks by.

    Args:
        study: its directions are those of the objectives.
        storage: what the study is kept in.
        space: draws the parameters of a trial, and returns its configuration.
        objectives: in the order of the study's directions.
        max_epochs: epochs of a trial that is not stopped early.
        num_trials: how many to propose in all, those of earlier runs included, but not what was
            proposed again after it failed.
        max_concurrent_trials: returns how many trials may be proposed and not ended at a time. One
            more than the cluster runs keeps it busy; further ones would be proposed knowing less.
        enlarge: called with the number of a trial that ran out of memory; returns what it asks for
            next, as a multiple of the usual resources, or None to let it fail.
        starts_again: called with Ray's id of a trial that failed; returns whether it is proposed
            again.
        on_trial_end: called with each trial before Optuna is told its end, after which Optuna
            takes nothing more about it.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: BaseStorage,
        space: Space,
        *,
        objectives: Sequence[Objective],
        max_epochs: int,
        num_trials: int,
        max_concurrent_trials: Callable[[], int] = lambda: sys.maxsize,
        enlarge: Callable[[int], int | None] = lambda _: None,
        starts_again: Callable[[str], bool] = lambda _: False,
        on_trial_end: Callable[[optuna.Trial], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self._study = study
        self._trials = StoredTrials(study, storage)
        self._space = space
        self._objectives = tuple(objectives)
        self._max_epochs = max_epochs
        self._max_live = max_concurrent_trials
        self._enlarge = enlarge
        self._starts_again = starts_again
        self._on_trial_end = on_trial_end
        self._live: dict[str, int] = {}
        known = retry(lambda: study.get_trials(deepcopy=False), _WHAT, STORAGE_ERRORS)
        self.num_trials = num_trials + sum(_RETRY_OF in trial.user_attrs for trial in known)
        self._asked = {trial.number for trial in known if trial.state != TrialState.WAITING}
        self._again = deque(t.number for t in known if t.state == TrialState.RUNNING)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out everything: Ray pickles its searcher, and the storage may hold a password."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Write nothing; Optuna's storage is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing; Optuna's storage is the state."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return the configuration of the next trial, None for "later", or FINISHED."""
        if self._live and len(self._live) >= self._max_live():
            return None
        trial = self._next()
        if trial is None:
            return None if self._live else Searcher.FINISHED
        self._live[trial_id] = trial.number
        self._asked.add(trial.number)
        params = retry(lambda: self._space(trial), _WHAT, STORAGE_ERRORS)
        return {**params, NUMBER: trial.number}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Record the first objective of an epoch as an intermediate value."""
        self._report(self._live[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Report the end of a trial to Optuna, or propose it again if it is to start again."""
        number = self._live.pop(trial_id, None)
        if number is None:  # Ray calls this twice if a callback fails at the end of a trial.
            return
        result = result or {}
        short = result.get(OUT_OF_MEMORY) and self._enlarge(number) is not None
        if short or (error and self._starts_again(trial_id)):
            self._again.append(number)
            return
        self.tell(number, result, error)

    def tell(self, number: int, metrics: Mapping[str, Any], error: bool = False) -> State:
        """Report the end of a trial with its last metrics to Optuna; return how it ended.

        The metrics are recorded as a report too: Ray passes on no report of the epoch at which a
        trial is stopped. Calling this again changes nothing.
        """
        ended = how_ended(metrics, self._objectives, self._max_epochs, error)
        if number in self._again:
            self._again.remove(number)

        def tell() -> None:
            trial = self._trials.take_up(number)
            several = len(self._objectives) > 1
            values = None
            if ended == "completed":
                values = [float(metrics[each.name]) for each in self._objectives]
            # A constraint that an earlier attempt or process has set stays.
            elif several and ended == "stopped" and EPOCHS_MISSING not in trial.constraints:
                trial.set_constraint(EPOCHS_MISSING, self._max_epochs - metrics[EPOCH])
            self._study.tell(number, values, state=_IN_OPTUNA[ended], skip_if_finished=True)

        if not self.is_told(number):
            if not error:
                self._report(number, metrics)
            self._on_trial_end(self._trials.take_up(number))
            retry(tell, _WHAT, STORAGE_ERRORS)
        return ended

    def _report(self, number: int, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(self._objectives[0].name)
        if value is None or EPOCH not in metrics or metrics.get(OUT_OF_MEMORY):
            return
        retry(
            lambda: self._trials.set_intermediate_value(number, int(metrics[EPOCH]), float(value)),
            _WHAT,
            STORAGE_ERRORS,
        )

    def is_told(self, number: int) -> bool:
        """Return whether a trial has ended according to Optuna."""
        return self._frozen(number).state.is_finished()

    def failed(self) -> list[int]:
        """Return the numbers of the trials that failed according to Optuna."""
        trials = retry(
            lambda: self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,)),
            _WHAT,
            STORAGE_ERRORS,
        )
        return [trial.number for trial in trials]

    def propose_again(self, number: int) -> None:
        """Propose a failed trial once more, as another trial. Further calls change nothing."""

        def is_proposed() -> bool:
            trials = self._study.get_trials(deepcopy=False)
            return any(trial.user_attrs.get(_RETRY_OF) == number for trial in trials)

        def propose() -> None:
            if not is_proposed():  # An attempt that seemed to fail may have proposed it.
                params = self._trials.read(number).params
                self._study.enqueue_trial(params, user_attrs={_RETRY_OF: number})

        if not retry(is_proposed, _WHAT, STORAGE_ERRORS):
            retry(propose, _WHAT, STORAGE_ERRORS)
            self.num_trials += 1

    def _next(self) -> optuna.Trial | None:
        if self._again:
            return self._trials.take_up(self._again.popleft())
        if len(self._asked) >= self.num_trials:
            return None
        tries = 0

        def ask() -> optuna.Trial:
            nonlocal tries
            tries += 1
            # An attempt that seemed to fail may have created a trial.
            if tries > 1:
                for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    if trial.number not in self._asked:
                        return self._trials.take_up(trial.number)
            return self._study.ask()

        return retry(ask, _WHAT, STORAGE_ERRORS)

    def _frozen(self, number: int) -> FrozenTrial:
        return retry(lambda: self._trials.read(number), _WHAT, STORAGE_ERRORS)


def enqueue(study: optuna.Study, points: Sequence[Mapping[str, Any]]) -> None:
    """Make a study try these points first; points that it has already are left out."""
    for point in points:
        add = partial(study.enqueue_trial, dict(point), skip_if_exists=True)
        retry(add, _WHAT, STORAGE_ERRORS)


def how_ended(
    metrics: Mapping[str, Any], objectives: Sequence[Objective], max_epochs: int, error: bool
) -> State:
    """Return how a trial with these last metrics ended; one without all objectives failed."""
    if error or EPOCH not in metrics or not has_objectives(metrics, objectives):
        return "failed"
    return "completed" if metrics[EPOCH] >= max_epochs else "stopped"
