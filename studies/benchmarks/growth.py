"""Measure how the relative cost of BCPL scales with batch size, classes and CAM grid.

python -m studies.benchmarks.growth --out results/speed

Interleaves the trainer's steps with cross-entropy and with BCPL on random images. One quantity is
varied at a time around a batch of 128 images, 10 classes and a grid of 14x14. SimpleCNN halves its
input once, so the resolution determines the grid. The cost of all other layers grows with it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from batchcam.devices import resolve_device
from batchcam.figures import save
from batchcam.provenance import command_line, git_commit, package_versions
from studies.benchmarks.batches import CROSS_ENTROPY, LOSSES, Bench, config, peak_bytes
from studies.benchmarks.pairs import median_ratio, time_interleaved

BCPL = "BCPL, L1"
AXES = {"batch": "images in a batch", "classes": "classes", "grid": "cells on a side of a CAM"}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Measure the cost of a BCPL step relative to a cross-entropy step at several sizes."""

    out: Path
    """Output folder for growth.json and growth.png."""
    batch: tuple[int, ...] = (16, 64, 128, 256, 1024)
    """Images per batch."""
    classes: tuple[int, ...] = (10, 30, 100, 300, 1000)
    """Numbers of classes of the data and of the head."""
    grid: tuple[int, ...] = (4, 7, 14, 21, 28)
    """Sides of the CAM grid, in cells."""
    seconds: float = 20.0
    """Time limit for each point, warm-up excluded."""
    min_rounds: int = 7
    """Minimum number of rounds per point, even if they exceed the time limit."""
    threads: int = 2
    """PyTorch threads."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of weights, images and the order within each round."""


@dataclass(frozen=True)
class Point:
    """Sizes at which a step is measured, and which of them is varied (`axis`)."""

    axis: str
    batch: int = 128
    classes: int = 10
    grid: int = 14

    @property
    def value(self) -> int:
        """The value of the varied size."""
        return int(getattr(self, self.axis))


def points(settings: Growth) -> Iterator[Point]:
    """Yield all points, in the order of :data:`AXES`."""
    for axis in AXES:
        for value in getattr(settings, axis):
            yield replace(Point(axis), **{axis: value})


def measure(point: Point, settings: Growth) -> dict[str, Any]:
    """Return a point's entry in growth.json."""
    device = resolve_device(settings.device)
    bench = Bench.build(
        replace(config("simple_cnn", point.batch), resolution=2 * point.grid, seed=settings.seed),
        device,
        point.classes,
    )
    steps = {name: bench.step(LOSSES[name]) for name in (CROSS_ENTROPY, BCPL)}
    seconds = time_interleaved(
        steps,
        seconds=settings.seconds,
        min_rounds=settings.min_rounds,
        seed=settings.seed,
        device=device,
    )["wall"]
    return {
        **asdict(point),
        "rounds": len(seconds[BCPL]),
        "milliseconds": {n: round(float(np.median(t)) * 1e3, 3) for n, t in seconds.items()},
        "ratio": median_ratio(seconds[BCPL], seconds[CROSS_ENTROPY]).as_list(),
        "memory_bytes": {name: peak_bytes(step, device) for name, step in steps.items()},
        "load": round(os.getloadavg()[0], 1),
    }


def main(settings: Growth) -> None:
    """Measure all points; write growth.json and growth.png."""
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    origin = {
        "command": command_line(),
        "git_commit": git_commit(),
        "versions": package_versions(),
        "device": settings.device,
        "threads": settings.threads,
        "seed": settings.seed,
    }
    entries = []
    for point in points(settings):
        entries.append(measure(point, settings))
        median, low, high = entries[-1]["ratio"]
        print(f"{point.axis} {point.value}: {median:.3f} ({low:.3f} to {high:.3f})", flush=True)
    (settings.out / "growth.json").write_text(
        json.dumps({**origin, "points": entries}, indent=1) + "\n"
    )
    save(draw(entries), settings.out / "growth.png")


def draw(entries: list[dict[str, Any]]) -> Figure:
    """Return a figure of the time and memory of BCPL relative to cross-entropy along each axis."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
        shown = [entry for entry in entries if entry["axis"] == name]
        values = [entry[name] for entry in shown]
        rows = np.array([entry["ratio"] for entry in shown]).reshape(-1, 3)
        spread = np.abs(rows[:, 1:].T - rows[:, 0])
        axis.errorbar(values, rows[:, 0], yerr=spread, fmt="o-", capsize=3, label="time")
        memory = [e["memory_bytes"][BCPL] / e["memory_bytes"][CROSS_ENTROPY] for e in shown]
        axis.plot(values, memory, "s--", ms=4, label="peak memory")
        axis.axhline(1, color="grey", lw=1)
        axis.set_xscale("log")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("BCPL-L1 over cross-entropy")
    figure.axes[0].legend()
    return figure


if __name__ == "__main__":
    main(tyro.cli(Growth))
