"""How long it takes until the first step: of a process, and of a trial in a process that is reused.

python -m studies.benchmarks.startup --out results/speed

A new process is timed from the outside, from its start to the end of its first step, imports, data,
prototypes and the SSIM ceiling included. In a process that has trained before, as a reused actor
has, with data and ceiling at hand as a study hands them out, what is timed is `batchcam.fit` up to
its first step; a step of its own is subtracted.
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

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.provenance import command_line, git_commit, package_versions
from batchcam.training.fit import fit

TARGETS = {"process": 6.0, "reused": 0.3}
"""Seconds that SimpleCNN is to take at most."""

_CHILD = """
import sys, time
from batchcam.config import TrialConfig
from batchcam.train import fit

def stop(step, steps):
    print(time.time())
    sys.exit()

fit(TrialConfig(backbone=sys.argv[1], dataset=sys.argv[2], device="cpu"), on_step=stop)
"""


@dataclass(frozen=True, kw_only=True)
class Startup:
    """Measure the seconds until the first step."""

    out: Path
    """Folder for startup.json."""
    backbones: tuple[str, ...] = ("simple_cnn", "resnet18", "convnextv2_tiny")
    """Models at 28x28."""
    dataset: str = "digits"
    """What is trained on: digits, mnist or fashion_mnist."""
    repeats: int = 5
    """How often each is timed."""


class _FirstSteps(Exception):  # noqa: N818 - how a run is left, not an error.
    """Two steps were taken."""


def main(settings: Startup) -> None:
    """Measure, and write what was measured."""
    base = TrialConfig(dataset=settings.dataset, device="cpu")
    prepared = prepare(base)
    measured = {
        "seconds": {
            backbone: {
                "process": _spread(
                    [of_process(backbone, settings) for _ in range(settings.repeats)]
                ),
                "reused": _spread(
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
    began = time.time()
    command = [sys.executable, "-c", _CHILD, backbone, settings.dataset]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout) - began


def of_reused(config: TrialConfig, prepared: PreparedData, repeats: int) -> list[float]:
    """Return the seconds of `fit` before its first step, once there has been such a trial."""
    found = []
    for _ in range(repeats + 1):
        stamps = [time.perf_counter()]

        def note(step: int, steps: int, stamps: list[float] = stamps) -> None:
            del step, steps
            stamps.append(time.perf_counter())
            if len(stamps) > 2:
                raise _FirstSteps

        try:
            fit(config, prepared=prepared, on_step=note)
        except _FirstSteps:
            began, first, second = stamps
            found.append(max(0.0, (first - began) - (second - first)))
    return found[1:]


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "median": round(median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


if __name__ == "__main__":
    main(tyro.cli(Startup))
