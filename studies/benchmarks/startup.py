"""Measure the time to the first training step, in a new process and in a reused process.

python -m studies.benchmarks.startup --out results/speed

New process: the time from its start to the end of its first step, measured from outside. It
includes imports, data, prototypes and the SSIM ceiling. Reused process: the time that
`batchcam.fit` takes before its first step, in a process that has trained before, like a reused Ray
actor. Data and SSIM ceiling are prepared, as in a study. The duration of the first step is
estimated by that of the second one and subtracted.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from batchcam.config import Dataset, TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.provenance import command_line, git_commit, package_versions
from batchcam.training.fit import fit

TARGETS = {"process": 6.0, "reused": 0.3}
"""Upper limits for SimpleCNN, in seconds."""

_CHILD = """
import sys, time
from batchcam.config import TrialConfig
from batchcam.training.fit import fit

def stop(step, steps):
    print(time.time())
    sys.exit()

fit(TrialConfig(backbone=sys.argv[1], dataset=sys.argv[2], device="cpu"), on_step=stop)
"""


@dataclass(frozen=True, kw_only=True)
class Startup:
    """Measure the time to the first training step."""

    out: Path
    """Output folder for startup.json."""
    backbones: tuple[str, ...] = ("simple_cnn", "resnet18", "convnextv2_tiny")
    """Models, at a resolution of 28x28."""
    dataset: Dataset = "digits"
    """Training data."""
    repeats: int = 5
    """Number of measurements of each time."""


class _TwoStepsDone(Exception):  # noqa: N818 - stops training, and is not an error.
    """Raised after two steps to stop training."""


def main(settings: Startup) -> None:
    """Measure all models, write startup.json, and print the seconds."""
    base = TrialConfig(dataset=settings.dataset, device="cpu")
    prepared = prepare(base)
    measured = {
        "seconds": {
            backbone: {
                "process": _summary(
                    [of_process(backbone, settings) for _ in range(settings.repeats)]
                ),
                "reused": _summary(
                    of_reused(replace(base, backbone=backbone), prepared, settings.repeats)
                ),
            }
            for backbone in settings.backbones
        },
        "targets_of_simple_cnn": TARGETS,
        "dataset": settings.dataset,
        "repeats": settings.repeats,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "git_commit": git_commit(),
        "versions": package_versions(),
        "command": command_line(),
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "startup.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps(measured["seconds"], indent=1))


def of_process(backbone: str, settings: Startup) -> float:
    """Return the seconds from the start of a new process to the end of its first step."""
    started = time.time()
    command = [sys.executable, "-c", _CHILD, backbone, settings.dataset]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(child.stdout) - started


def of_reused(config: TrialConfig, prepared: PreparedData, repeats: int) -> list[float]:
    """Return the seconds of `fit` before its first step, `repeats` times after one warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        timestamps = [time.perf_counter()]

        def on_step(step: int, steps: int, timestamps: list[float] = timestamps) -> None:
            del step, steps
            timestamps.append(time.perf_counter())
            if len(timestamps) > 2:
                raise _TwoStepsDone

        try:
            fit(config, prepared=prepared, on_step=on_step)
        except _TwoStepsDone:
            started, first, second = timestamps
            seconds.append(max(0.0, (first - started) - (second - first)))
    return seconds[1:]


def _summary(values: list[float]) -> dict[str, Any]:
    return {
        "median": round(median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


if __name__ == "__main__":
    main(tyro.cli(Startup))
