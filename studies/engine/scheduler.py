"""Early stopping, as Ray Tune asks for it: which trials are not worth going on with."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from studies.engine.halving import ParetoHalving
from studies.trial import OUT_OF_MEMORY

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


class ParetoASHA(FIFOScheduler):
    """Asynchronous successive halving on all objectives of a study.

    Decides by :class:`studies.engine.halving.ParetoHalving`. Trials are told apart by the
    `number` in their configuration, and epochs are counted by the trial itself: Ray's ids and
    iterations start anew after a restart.

    Args:
        objectives: metrics that a result must have, all maximised; the first one leads.
        min_epochs: the first rung; at most `max_epochs`, where it stops nothing.
        max_epochs: of each trial.
        reduction_factor: of the trials at a rung, one in so many goes on.
        brackets: sets of rungs to share the trials out to.
        seed: of the draw of brackets.

    Raises:
        ConfigError: see :class:`studies.engine.halving.ParetoHalving`.
    """

    def __init__(
        self,
        *,
        objectives: Sequence[str],
        min_epochs: int,
        max_epochs: int,
        reduction_factor: int = 2,
        brackets: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._objectives = tuple(objectives)
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
        """
        if result.get("done") and "epoch" not in result:
            return TrialScheduler.CONTINUE  # It ended without a report; so says Ray, not the trial.
        if result.get(OUT_OF_MEMORY):
            return TrialScheduler.STOP  # To be started anew: this is no report of an epoch.
        going_on = self._judge(trial.config["number"], result)
        return TrialScheduler.CONTINUE if going_on else TrialScheduler.STOP

    def replay(self, number: int, metrics: Mapping[str, float]) -> bool:
        """Return whether a trial went on after a report of before a restart.

        Reports must come in the order in which they were judged then.

        Raises:
            ValueError: `metrics` lack an objective.
        """
        return self._judge(number, metrics)

    def _judge(self, number: int, result: Mapping[str, Any]) -> bool:
        missing = [name for name in ("epoch", *self._objectives) if name not in result]
        if missing:
            raise ValueError(
                f"trial {number} reported no {' and no '.join(missing)}, which early stopping "
                f"needs; report it after each epoch, or choose other objectives than "
                f"{', '.join(self._objectives)}."
            )
        values = [result[name] for name in self._objectives]
        return self._halving.judge(number, int(result["epoch"]), values)
