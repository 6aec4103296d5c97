"""Measure the driver's time per report and memory per trial in a large study.

python -m studies.benchmarks.scale --out results/scale

Ray Tune's controller, the Optuna searcher, early stopping and the ledger are the real ones. Only
the actors are simulated; they report immediately, so that only the driver's cost is measured.
"""

import json
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib
import numpy as np
import ray
import tyro
from matplotlib.figure import Figure
from ray import tune
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.tune.experiment import Trial

from batchcam.provenance import command_line, git_commit, package_versions
from studies.benchmarks.dummy import DummyStudy, curve
from studies.engine.protocol import REPORTED
from studies.engine.run import run_search
from studies.monitoring.progress import on_terminal
from studies.planning.resources import TrialResources, alive_nodes, slots

_WINDOW = 100


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Measure the driver in a study of many simulated trials."""

    out: Path
    """Output folder for measured.json and scale.png."""
    trials: int = 2000
    """Number of trials."""
    at_a_time: int = 200
    """Number of concurrent trials."""
    epochs: int = 8
    """Epochs of a trial that is not stopped early."""
    seed: int = 0
    """Seed of the search."""


class SimulatedActors:
    """The part of Ray's actor manager that the controller uses, with actors that reply immediately.

    Each live actor has one task at a time. Tasks are completed first in, first out, so that all
    trials advance together.
    """

    def __init__(self, slots: int, epochs: int) -> None:
        self._slots = slots
        self._epochs = epochs
        self._waiting: deque[TrackedActor] = deque()
        self._tasks: deque[tuple[TrackedActor, str, tuple[Any, ...], Callable[..., None]]] = deque()
        self._params: dict[TrackedActor, dict[str, Any]] = {}
        self._epoch: dict[TrackedActor, int] = {}
        self._num_created = 0
        # The controller reads this private attribute to look up a started actor.
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[None]] = {}

    def add_actor(self, *, kwargs: dict[str, Any], **callbacks: Any) -> TrackedActor:
        """Queue an actor, which starts when a slot is free."""
        self._num_created += 1
        names = ("on_start", "on_stop", "on_error")
        actor = TrackedActor(self._num_created, **{name: callbacks[name] for name in names})
        self._params[actor] = kwargs["config"]
        self._epoch[actor] = 0
        self._waiting.append(actor)
        return actor

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] = (),
        on_result: Callable[..., None] | None = None,
        **rest: Any,
    ) -> None:
        """Queue a task of an actor; tasks without a result callback are dropped."""
        del rest
        if on_result is not None:
            self._tasks.append((tracked_actor, method_name, args, on_result))

    def next(self, timeout: float) -> bool:
        """Start a queued actor or complete a task; return whether there was one."""
        del timeout
        if self._waiting and len(self._live_actors_to_ray_actors_resources) < self._slots:
            actor = self._waiting.popleft()
            self._live_actors_to_ray_actors_resources[actor] = (None,)
            if actor._on_start:
                actor._on_start(actor)
            return True
        while self._tasks:
            actor, method, args, on_result = self._tasks.popleft()
            if actor in self._live_actors_to_ray_actors_resources:
                on_result(actor, self._result(actor, method, args))
                return True
        return False

    def remove_actor(self, tracked_actor: TrackedActor, **how: Any) -> None:
        """Remove an actor and call its `on_stop`."""
        del how
        if tracked_actor in self._waiting:
            self._waiting.remove(tracked_actor)
        self._live_actors_to_ray_actors_resources.pop(tracked_actor, None)
        if tracked_actor._on_stop:
            tracked_actor._on_stop(tracked_actor)

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        """Remove the queued tasks of an actor."""
        self._tasks = deque(task for task in self._tasks if task[0] is not tracked_actor)

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        """Return whether an actor has a slot."""
        return tracked_actor in self._live_actors_to_ray_actors_resources

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        """Return False: simulated actors never fail."""
        del tracked_actor
        return False

    def get_live_actors_resources(self) -> dict[str, float]:
        """Return an empty dict: the controller only prints it."""
        return {}

    def cleanup(self) -> None:
        """Do nothing."""

    @property
    def num_pending_actors(self) -> int:
        """Actors without a slot."""
        return len(self._waiting)

    @property
    def num_live_actors(self) -> int:
        """Actors with a slot."""
        return len(self._live_actors_to_ray_actors_resources)

    @property
    def num_total_actors(self) -> int:
        """All actors."""
        return self.num_pending_actors + self.num_live_actors

    @property
    def num_actor_tasks(self) -> int:
        """Queued tasks."""
        return len(self._tasks)

    def _result(self, actor: TrackedActor, method: str, args: tuple[Any, ...]) -> Any:
        if method == "reset":
            self._params[actor] = args[0]
            self._epoch[actor] = 0
            return True
        self._epoch[actor] += 1
        epoch = self._epoch[actor]
        params = self._params[actor]
        metrics = curve(params["x"], params["y"], epoch)
        return {
            **metrics,
            REPORTED: list(metrics),
            "training_iteration": epoch,
            "time_this_iter_s": 1.0,
            "time_total_s": float(epoch),
            "done": epoch >= self._epochs,
        }


class Meter(tune.Callback):
    """Records time, number of reports and memory after every 100 trials that end."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, float, float]] = []
        self._reports = 0
        self._ended = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Count a report."""
        del iteration, trials, trial, result, info
        self._reports += 1

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record a row after every `_WINDOW` trials that end."""
        del iteration, trials, trial, info
        self._ended += 1
        if self._ended % _WINDOW == 0:
            self.rows.append((self._ended, self._reports, time.perf_counter(), resident_bytes()))


def resident_bytes() -> float:
    """Return the resident memory of this process, or its peak where /proc is not available."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return pages * resource.getpagesize()


def main(settings: Scale) -> None:
    """Run the study, write measured.json and scale.png, and print the measurements."""
    study = DummyStudy(
        out=settings.out, trials=settings.trials, epochs=settings.epochs, seed=settings.seed
    )
    meter = Meter()
    actors = SimulatedActors(settings.at_a_time, settings.epochs)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            patch("ray.tune.execution.tune_controller.RayActorManager", lambda **_: actors),
        ):
            resources = TrialResources(1 / settings.at_a_time, 0, 1)
            search = study.search()
            run_search(
                search,
                Path(scratch),
                study.trainable(),
                resources.request,
                lambda: slots(alive_nodes(), resources),
                callbacks=[meter],
                progress=on_terminal(search),
            )
    finally:
        ray.shutdown()

    ended, reports, seconds, memory = map(np.array, zip(*meter.rows, strict=True))
    per_report = np.diff(seconds) / np.diff(reports) * 1e3
    per_trial = np.diff(memory) / np.diff(ended) / 1024
    settings.out.mkdir(parents=True, exist_ok=True)
    measured = {
        "trials_ended": ended[1:].tolist(),
        "milliseconds_per_report": per_report.round(2).tolist(),
        "kibibytes_per_trial": per_trial.round(1).tolist(),
        "resident_mebibytes": (memory[1:] / 2**20).round(1).tolist(),
        "reports": int(reports[-1]),
        "seed": settings.seed,
        "git_commit": git_commit(),
        "versions": package_versions("ray", "optuna"),
        "command": command_line(),
    }
    (settings.out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    draw(ended[1:], per_report, memory[1:] / 2**20).savefig(settings.out / "scale.png", dpi=120)
    print(json.dumps(measured, indent=2))


def draw(ended: Any, per_report: Any, memory: Any) -> Figure:
    """Return a figure of time per report and of memory over the number of ended trials."""
    matplotlib.rcParams["axes.spines.top"] = matplotlib.rcParams["axes.spines.right"] = False
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(ended, per_report, ".-")
    left.set(xlabel="trials ended", ylabel="driver's milliseconds per report")
    right.plot(ended, memory, ".-")
    right.set(xlabel="trials ended", ylabel="driver's memory, MiB")
    for axes, values in ((left, per_report), (right, memory)):
        axes.set_ylim(0, 1.1 * max(values))
    return figure


if __name__ == "__main__":
    main(tyro.cli(Scale))
