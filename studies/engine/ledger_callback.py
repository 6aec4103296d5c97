"""What Ray says of its trials, written to the ledger as it happens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from studies.engine.ledger import Ledger
from studies.engine.optuna_searcher import how_ended
from studies.trial import METRICS, OUT_OF_MEMORY, RESOURCE_MULTIPLIER, RESUMES_AT

ERRORS = "errors"
"""Where, in the study's folder, the errors of failed trials are."""


class LedgerCallback(tune.Callback):
    """Keeps the ledger of a study.

    Ray calls the scheduler before it, so that a report is judged, then recorded, then acted upon: a
    crash in between loses nothing that replaying the ledger does not bring back.
    """

    def __init__(
        self, ledger: Ledger, folder: Path, objectives: Sequence[str], max_epochs: int
    ) -> None:
        self._ledger = ledger
        self._folder = folder
        self._objectives = objectives
        self._max_epochs = max_epochs

    def __getstate__(self) -> dict[str, Any]:
        """Leave out everything: Ray pickles its callbacks, and the ledger is a file already."""
        return {}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record what the trial is to be."""
        del iteration, trials, info
        self._propose(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an epoch."""
        del iteration, trials, info
        if not result.get(OUT_OF_MEMORY):
            metrics = {name: result[name] for name in METRICS if name in result}
            self._ledger.report(trial.config["number"], metrics)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record that a trial ran to its end, or was stopped."""
        del iteration, trials, info
        number, last = trial.config["number"], trial.last_result
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
        """Record that a trial failed for good, and keep its error."""
        del iteration, trials, info
        self._propose(trial)  # One whose process did not come up was never started.
        text = Path(trial.error_file).read_text() if trial.error_file else "unknown error\n"
        folder = self._folder / ERRORS
        folder.mkdir(exist_ok=True)
        (folder / f"{trial.config['trial_id']}.txt").write_text(text, encoding="utf-8")
        lines = text.strip().splitlines()
        self._ledger.end(trial.config["number"], "failed", lines[-1] if lines else "unknown error")

    def _propose(self, trial: Trial) -> None:
        decided = {
            name: value
            for name, value in trial.config.items()
            if name not in (RESOURCE_MULTIPLIER, RESUMES_AT)
        }
        self._ledger.propose(decided)
