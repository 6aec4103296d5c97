"""Measure the driver's time per report and memory per trial in a large study.

python -m studies.benchmarks.scale --out results/scale

The trials are real Ray actors that train nothing and report without a pause. The driver's CPU time
is measured, because the wall time depends on how many CPUs the actors share with the driver.
"""

import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import ray
import tyro
from matplotlib.figure import Figure
from ray import tune
from ray.tune.experiment import Trial

from batchcam.provenance import command_line, git_commit, package_versions
from studies.benchmarks.dummy import DummyStudy, curve
from studies.engine.protocol import report
from studies.engine.run import run_search
from studies.monitoring.progress import on_terminal
from studies.planning.ray_cluster import connect
from studies.planning.resources import TrialResources, alive_nodes, slots

_WINDOW = 100


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Measure the driver in a study of many trials that train nothing."""

    out: Path
    """Output folder for measured.json and scale.png."""
    trials: int = 2000
    """Number of trials."""
    at_a_time: int = 16
    """Number of concurrent trials, each in a process of its own."""
    epochs: int = 8
    """Epochs of a trial that is not stopped early."""
    seed: int = 0
    """Seed of the search."""


class Meter(tune.Callback):
    """Records ended trials, reports, CPU seconds, seconds and memory after every 100 trials."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, float, float, float]] = []
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
            times = time.process_time(), time.perf_counter()
            self.rows.append((self._ended, self._reports, *times, resident_bytes()))


def resident_bytes() -> float:
    """Return the resident memory of this process, or its peak where /proc is not available."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return pages * resource.getpagesize()


def report_curve(params: dict[str, Any], *, epochs: int) -> None:
    """Report the epochs of a curve to Ray, one after the other."""
    for epoch in range(1, epochs + 1):
        report(curve(params["x"], params["y"], epoch))


def main(settings: Scale) -> None:
    """Run the study, write measured.json and scale.png, and print the measurements."""
    study = DummyStudy(
        out=settings.out, trials=settings.trials, epochs=settings.epochs, seed=settings.seed
    )
    search, meter = study.search(), Meter()
    resources = TrialResources(1, 0, 1)
    connect("local", cpus=settings.at_a_time)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run_search(
                search,
                Path(scratch),
                partial(report_curve, epochs=settings.epochs),
                resources.request,
                lambda: slots(alive_nodes(), resources),
                callbacks=[meter],
                progress=on_terminal(search),
            )
    finally:
        ray.shutdown()

    ended, reports, cpu_seconds, seconds, memory = map(np.array, zip(*meter.rows, strict=True))
    cpu_per_report = np.diff(cpu_seconds) / np.diff(reports) * 1e3
    settings.out.mkdir(parents=True, exist_ok=True)
    measured = {
        "trials_ended": ended[1:].tolist(),
        "driver_cpu_milliseconds_per_report": cpu_per_report.round(2).tolist(),
        "milliseconds_per_report": (np.diff(seconds) / np.diff(reports) * 1e3).round(2).tolist(),
        "kibibytes_per_trial": (np.diff(memory) / np.diff(ended) / 1024).round(1).tolist(),
        "resident_mebibytes": (memory[1:] / 2**20).round(1).tolist(),
        "reports": int(reports[-1]),
        "at_a_time": settings.at_a_time,
        "seed": settings.seed,
        "git_commit": git_commit(),
        "versions": package_versions("ray", "optuna"),
        "command": command_line(),
    }
    (settings.out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    draw(ended[1:], cpu_per_report, memory[1:] / 2**20).savefig(settings.out / "scale.png", dpi=120)
    print(json.dumps(measured, indent=2))


def draw(ended: Any, cpu_per_report: Any, memory: Any) -> Figure:
    """Return a figure of CPU time per report and of memory over the number of ended trials."""
    matplotlib.rcParams["axes.spines.top"] = matplotlib.rcParams["axes.spines.right"] = False
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(ended, cpu_per_report, ".-")
    left.set(xlabel="trials ended", ylabel="driver's CPU time per report, ms")
    right.plot(ended, memory, ".-")
    right.set(xlabel="trials ended", ylabel="driver's memory, MiB")
    for axes, values in ((left, cpu_per_report), (right, memory)):
        axes.set_ylim(0, 1.1 * max(values))
    return figure


if __name__ == "__main__":
    main(tyro.cli(Scale))
