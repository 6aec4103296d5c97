"""What a running study says: a line when a trial ends, and nothing else.

Lines, not a live display, so that it reads the same on a terminal and in the logs of a job.
"""

from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from rich.console import Console

console = Console(highlight=False, soft_wrap=True)


class TrialLines(tune.Callback):
    """Prints each trial's outcome as it ends.

    Args:
        num_trials: how many there will be in all.
        ended: how many have ended already.
    """

    def __init__(self, num_trials: int, ended: int = 0) -> None:
        self._num_trials = num_trials
        self._ended = ended

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Print the last metrics of a trial that ran to its end or was stopped early."""
        del iteration, trials, info
        last: dict[str, Any] = trial.last_result
        if last.get("out_of_memory"):
            console.print(f"          {trial.config['trial_id']}  out of memory")
        elif "val_accuracy" not in last:
            self._print(trial, "ended without a report")
        else:
            self._print(
                trial,
                f"accuracy {last['val_accuracy']:.4f}  SSIM {last['cam_ssim']:.3f} of "
                f"{last['cam_ssim_ceiling']:.3f}  {last['images_per_second']:,.0f} images/s  "
                f"after {last['epoch']} epochs",
            )

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Print that a trial failed for good."""
        del iteration, trials, info
        self._print(trial, f"failed; see errors/{trial.config['trial_id']}.txt")

    def _print(self, trial: Trial, outcome: str) -> None:
        self._ended += 1
        console.print(f"{self._ended:>4}/{self._num_trials}  {trial.config['trial_id']}  {outcome}")
