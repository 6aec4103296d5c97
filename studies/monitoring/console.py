"""Prints a line when a trial ends.

Lines read the same on a terminal and in the log of a job.
"""

from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from rich.console import Console

from studies.engine.ledger import Ledger
from studies.engine.protocol import EPOCH, NUMBER, OUT_OF_MEMORY, RESOURCE_MULTIPLIER

_SHOWN = {
    "val_accuracy": "accuracy {val_accuracy:.4f}",
    "cam_ssim": "SSIM {cam_ssim:.3f}",
    "cam_ssim_ceiling": "of {cam_ssim_ceiling:.3f}",
    "images_per_second": "{images_per_second:,.0f} images/s",
}

console = Console(highlight=False, soft_wrap=True)


class TrialLines(tune.Callback):
    """Prints the outcome of each trial when it ends.

    Args:
        ledger: the study's ledger, which records each event before this callback is called.
        num_trials: number of trials of the study.
        ended: number of trials that ended before.
    """

    def __init__(self, ledger: Ledger, num_trials: int, ended: int = 0) -> None:
        self._ledger = ledger
        self._num_trials = num_trials
        self._ended = ended

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Ray pickles its callbacks, and the ledger is a file already."""
        return {}

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Print the last metrics of a trial that completed or was stopped early."""
        del iteration, trials, info
        last: dict[str, Any] = trial.last_result
        if last.get(OUT_OF_MEMORY):
            console.print(f"          {trial.config['trial_id']}  out of memory")
        elif EPOCH not in last:
            self._print(trial, "ended without a report")
        else:
            parts = [shown.format(**last) for name, shown in _SHOWN.items() if name in last]
            parts.append(f"after {last['epoch']} epochs")
            self._print(trial, "  ".join(parts).replace("  of ", " of "))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Print that a trial failed for good, or that it starts again."""
        del iteration, trials, info
        history = self._ledger.get(trial.config[NUMBER])
        if history is not None and history.state is not None:
            self._print(trial, f"failed; see errors/{trial.config['trial_id']}.txt")
        elif history and history.resource_multiplier > trial.config[RESOURCE_MULTIPLIER]:
            console.print(f"          {trial.config['trial_id']}  out of memory")
        else:
            console.print(f"          {trial.config['trial_id']}  failed; starts again")

    def _print(self, trial: Trial, outcome: str) -> None:
        self._ended += 1
        console.print(f"{self._ended:>4}/{self._num_trials}  {trial.config['trial_id']}  {outcome}")
