"""A callback of Ray Tune that records the events of trials in the ledger."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from studies.engine.failures import Verdict
from studies.engine.ledger import Ledger
from studies.engine.optuna_searcher import how_ended
from studies.engine.protocol import (
    EPOCH,
    NUMBER,
    OUT_OF_MEMORY,
    RESOURCE_MULTIPLIER,
    RESUMES_AT,
    TRIAL_ID,
    Objective,
    reported_metrics,
)

ERRORS = "errors"
"""Name of the folder, in the study's folder, for the errors of failed trials."""


class LedgerCallback(tune.Callback):
    """Records the events of trials in the ledger of a study.

    Ray calls the scheduler before its callbacks, so a report is judged first, then recorded, then
    acted upon. Replaying the ledger restores whatever a crash in between loses.

    Args:
        ledger: the study's ledger.
        folder: the study's folder, in which `ERRORS` is made.
        objectives: the study's objectives.
        max_epochs: epochs of a trial that is not stopped early.
        verdict: returns what follows the failure of a trial, by Ray's id of it.
    """

    def __init__(
        self,
        ledger: Ledger,
        folder: Path,
        objectives: Sequence[Objective],
        max_epochs: int,
        verdict: Callable[[str], Verdict] = lambda _: Verdict(False),
    ) -> None:
        self._ledger = ledger
        self._folder = folder
        self._objectives = objectives
        self._max_epochs = max_epochs
        self._verdict = verdict

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Ray pickles its callbacks, and the ledger is a file already."""
        return {}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record the trial's parameters."""
        del iteration, trials, info
        self._propose(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record the metrics of an epoch.

        Raises:
            ValueError: the trainable did not report through `studies.engine.protocol.report`.
        """
        del iteration, trials, info
        if EPOCH in result and not result.get(OUT_OF_MEMORY):
            self._ledger.report(trial.config[NUMBER], reported_metrics(result))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record that a trial ran to its end, or was stopped."""
        del iteration, trials, info
        number, last = trial.config[NUMBER], trial.last_result
        if not last.get(OUT_OF_MEMORY):
            ended = how_ended(last, self._objectives, self._max_epochs, error=False)
            error = None if ended != "failed" else "an objective was not reported as a number"
            self._ledger.end(number, ended, error)
        elif (history := self._ledger.get(number)) and history.resource_multiplier == trial.config[
            RESOURCE_MULTIPLIER
        ]:
            self._ledger.end(number, "failed", "out of memory, with all that a node has")

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record that a trial failed, unless it starts again, and save its error."""
        del iteration, trials, info
        verdict = self._verdict(trial.trial_id)
        if verdict.starts_again:
            return
        self._propose(trial)  # A trial whose process did not come up was never started.
        text = Path(trial.error_file).read_text() if trial.error_file else "unknown error\n"
        folder = self._folder / ERRORS
        folder.mkdir(exist_ok=True)
        (folder / f"{trial.config[TRIAL_ID]}.txt").write_text(text, encoding="utf-8")
        lines = text.strip().splitlines()
        error = lines[-1] if lines else "unknown error"
        if verdict.reason is not None:
            error = f"out of memory ({verdict.reason}), with all that a node has"
        self._ledger.end(trial.config[NUMBER], "failed", error)

    def _propose(self, trial: Trial) -> None:
        proposed = {
            name: value
            for name, value in trial.config.items()
            if name not in (RESOURCE_MULTIPLIER, RESUMES_AT)
        }
        self._ledger.propose(proposed)
