"""Early stopping as a scheduler of Ray Tune."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from studies.engine.halving import ParetoHalving
from studies.engine.protocol import (
    EPOCH,
    NUMBER,
    OUT_OF_MEMORY,
    UNUSABLE_NODE,
    Objective,
    SearchStoppedError,
)

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


class ParetoASHA(FIFOScheduler):
    """Asynchronous successive halving on all objectives of a study.

    Decides by :class:`studies.engine.halving.ParetoHalving`. Identifies a trial by the `number` in
    its configuration, and takes the epoch from its report: Ray's ids and iterations start again
    after a restart.

    Args:
        objectives: metrics that every report must have; the first one leads.
        min_epochs: the first rung; values above `max_epochs` are taken as `max_epochs`.
        max_epochs: epochs of a trial that is not stopped early.
        reduction_factor: one in so many of the trials at a rung continues.
        brackets: sets of rungs to distribute the trials over.
        seed: seed of the draw of brackets.
        on_error: called with each trial that fails, before the searcher learns of it.

    Raises:
        ConfigError: see :class:`studies.engine.halving.ParetoHalving`.
    """

    def __init__(
        self,
        *,
        objectives: Sequence[Objective],
        min_epochs: int,
        max_epochs: int,
        reduction_factor: int = 2,
        brackets: int = 1,
        seed: int = 0,
        on_error: Callable[[Trial], None] = lambda _: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._objectives = tuple(objectives)
        self._on_error = on_error
        self._halving = ParetoHalving(
            min_epochs=min(min_epochs, max_epochs),
            max_epochs=max_epochs,
            reduction_factor=reduction_factor,
            brackets=brackets,
            seed=seed,
        )

    def on_trial_result(
        self,
        tune_controller: "TuneController",  # noqa: ARG002
        trial: Trial,
        result: dict[str, Any],
    ) -> str:
        """Return whether Ray should CONTINUE or STOP a trial.

        Raises:
            ValueError: the result lacks the epoch or an objective.
            SearchStoppedError: no trial can run on the trial's node.
        """
        if UNUSABLE_NODE in result:
            raise SearchStoppedError(result[UNUSABLE_NODE])
        if result.get("done") and EPOCH not in result:
            return TrialScheduler.CONTINUE  # Ray ended a trial that reported nothing.
        if result.get(OUT_OF_MEMORY):
            return TrialScheduler.STOP  # No epoch was finished; the trial starts again.
        continues = self._judge(trial.config[NUMBER], result)
        return TrialScheduler.CONTINUE if continues else TrialScheduler.STOP

    def on_trial_error(
        self,
        tune_controller: "TuneController",  # noqa: ARG002
        trial: Trial,
    ) -> None:
        """Pass on that a trial failed."""
        self._on_error(trial)

    def replay(self, number: int, metrics: Mapping[str, float]) -> bool:
        """Return whether a trial continues after a report from before a restart.

        Reports must come in the order in which they were judged first.

        Raises:
            ValueError: `metrics` lack an objective.
        """
        return self._judge(number, metrics)

    def _judge(self, number: int, result: Mapping[str, Any]) -> bool:
        names = [each.name for each in self._objectives]
        missing = [name for name in (EPOCH, *names) if name not in result]
        if missing:
            raise ValueError(
                f"trial {number} reported no {' and no '.join(missing)}, which early stopping "
                f"needs; report it after each epoch, or choose other objectives than "
                f"{', '.join(names)}."
            )
        values = [each.gain(result[each.name]) for each in self._objectives]
        return self._halving.judge(number, int(result[EPOCH]), values)
