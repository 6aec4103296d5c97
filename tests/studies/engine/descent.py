"""A study without images, which searches step sizes for gradient descent on a parabola.

python -m tests.studies.engine.descent FOLDER RAY_ADDRESS

Three objectives, of which `gap` is minimised. A trial saves checkpoints and resumes from them. A
step size that is too large raises `DivergedError`.
"""

import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray

from batchcam.errors import DivergedError
from studies.engine.checkpoints import Checkpoints
from studies.engine.protocol import RESUMES_AT, TRIAL_ID, Metrics, Objective, report, report_again
from studies.engine.run import Search, run_search

OBJECTIVES = (
    Objective("gap", "distance to the minimum", "minimize", ".2e"),
    Objective("gentleness", "gentleness of the steps"),
    Objective("thrift", "thrift", short="cheap"),
)
TRIALS = 10
EPOCHS = 4
DIVERGES = {"rate": 1.5, "decay": 1.0}
SEARCH_NAME = "descent"


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Draw the step size, and its decay if the first step does not overshoot."""
    rate = trial.suggest_float("rate", 0.05, 1.5)
    return {"rate": rate, "decay": trial.suggest_float("decay", 0.5, 1.0) if rate < 0.5 else 1.0}


def metrics(params: dict[str, Any], epoch: int) -> Metrics:
    """Return a trial's metrics after an epoch; an epoch is one step of descent on (x - 3)²."""
    gap, rate = 3.0, params["rate"]
    for _ in range(epoch):
        gap = abs(gap - 2 * rate * gap)
        rate *= params["decay"]
    if gap > 5:
        raise DivergedError(f"descent diverged in epoch {epoch}; lower rate.")
    return {
        "epoch": epoch,
        "gap": gap,
        "gentleness": 1 / (1 + rate),
        "thrift": 1 - params["decay"] / 2 + params["rate"] / 4,
        "log_gap": math.log(gap) if gap else -math.inf,
        "undefined": math.nan,
    }


def train(params: dict[str, Any], *, folder: str) -> None:
    """Run one trial, from its newest checkpoint if there is one."""
    checkpoints = Checkpoints(f"{folder}/{params[TRIAL_ID]}")
    with checkpoints.newest() as state:
        history: list[Metrics] = [] if state is None else json.loads(state.read_text())
    report_again(history, params[RESUMES_AT])
    for epoch in range(len(history) + 1, EPOCHS + 1):
        time.sleep(0.05)
        history.append(metrics(params, epoch))
        checkpoints.save(epoch, partial(Path.write_text, data=json.dumps(history)))
        report(history[-1])


def main(folder: Path, address: str) -> None:
    """Start the study, or resume it if it exists."""
    folder.mkdir(exist_ok=True)
    ray.init(address=address, log_to_driver=False)
    search = Search(
        name=SEARCH_NAME,
        key=SEARCH_NAME,
        space=space,
        first_points=[DIVERGES, {"rate": 0.3, "decay": 0.9}],
        objectives=OBJECTIVES,
        min_epochs=1,
        max_epochs=EPOCHS,
        num_trials=TRIALS,
        max_failures=0,
    )
    trainable = partial(train, folder=str(folder / "checkpoints"))
    run_search(search, folder, trainable, lambda multiplier: {"CPU": multiplier}, lambda: 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
