"""The cost of a training step, and the part of the explanation in it.

python -m studies.benchmarks.steps --out results/speed

A step is the trainer's own, on a batch of noise: preprocessing, both passes, the optimiser. The
seven losses train one model in turns (see `studies.benchmarks.pairs`). Beside them, BCPL is
timed against its predecessor, and against cross-entropy with pytorch-grad-cam in the loop.

Each condition is written to steps.json when it is measured, and so is the table. An interrupted run
resumes; a run at another commit measures again.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from batchcam.config import Precision
from batchcam.devices import resolve_device
from batchcam.figures import save
from batchcam.provenance import command_line, git_commit, package_versions
from studies.baselines.hookable_model import HookableModel
from studies.baselines.predecessor import Reach
from studies.baselines.predecessor import training_step as predecessor_step
from studies.benchmarks.batches import (
    CROSS_ENTROPY,
    EXTENSIONS,
    LOSSES,
    Bench,
    config,
    peak_bytes,
)
from studies.benchmarks.pairs import CLOCKS, Seconds, median_ratio, time_interleaved

BCPL = "BCPL, L1"
BACKBONES = ("simple_cnn", "resnet18", "convnextv2_tiny")
TARGETS = {"BCPL": 1.02, "Prototype Loss": 1.03, "SSIM": 1.05, "memory": 1.05}
"""Targets: the highest ratio of a step's cost to that of cross-entropy."""
SPEEDUPS = {
    ("predecessor", "simple_cnn"): 20.0,
    ("predecessor", "resnet18"): 3.0,
    ("pytorch-grad-cam", "simple_cnn"): 1.9,
    ("pytorch-grad-cam", "resnet18"): 1.9,
}
"""Targets: the lowest ratio of a rival's step to BCPL's, by first word of rival and backbone."""

Rivals = Literal["losses", "extensions", "baselines", "predecessor_model"]
_OURS = ("losses", "extensions")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Measure the cost of a training step, and the part of the explanation in it."""

    out: Path
    """Folder for steps.json, steps.md and steps.png."""
    backbones: tuple[str, ...] = BACKBONES
    """Models; convnextv2_tiny has a quarter of the batch."""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    """Whether the features are compiled."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Precisions of the forward pass."""
    rivals: tuple[Rivals, ...] = ("losses", "baselines")
    """Groups of methods to time: the paper's losses, or the other losses of this project;
    BCPL beside other ways to compute CAMs; or the predecessor as published, minutes per step."""
    batch_size: int = 128
    """Images in a batch."""
    seconds: float = 60.0
    """Time for each condition, warm-up excluded."""
    min_rounds: int = 7
    """Rounds of each condition, even if they take longer."""
    threads: int = 1
    """PyTorch threads. CPU seconds are comparable with one thread only."""
    clock: Literal["wall", "cpu"] = "wall"
    """Clock of the table and the figure; steps.json has both."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""
    again: bool = False
    """Measure conditions again that have an entry of this commit."""
    seed: int = 0
    """Seed of weights, noise and the order within a round."""


@dataclass(frozen=True)
class Condition:
    """Rivals that are measured together, in turns, on one model."""

    rivals: Rivals
    backbone: str
    mode: str
    precision: Precision
    batch_size: int
    threads: int
    device: str

    @property
    def base(self) -> str:
        """The rival that the others are compared with."""
        return CROSS_ENTROPY if self.rivals in _OURS else BCPL


def conditions(settings: Steps) -> Iterator[Condition]:
    """Yield the conditions of `settings`, cheap first; baselines are eager, in fp32, on CNNs."""
    for rivals, backbone in product(settings.rivals, settings.backbones):
        large = backbone.startswith("convnext")
        batch_size = max(1, settings.batch_size // 4) if large else settings.batch_size
        if rivals not in _OURS and large:
            continue
        variants: list[tuple[str, Precision]] = [("eager", "fp32")]
        if rivals in _OURS:
            variants = list(product(settings.modes, settings.precisions))
        for mode, precision in variants:
            yield Condition(
                rivals, backbone, mode, precision, batch_size, settings.threads, settings.device
            )


def measure(condition: Condition, settings: Steps) -> dict[str, Any]:
    """Return a condition's entry in steps.json."""
    torch.compiler.reset()  # Otherwise the models of earlier conditions count as recompilations.
    device = resolve_device(condition.device)
    settled = config(
        condition.backbone,
        condition.batch_size,
        compiled=condition.mode == "compiled",
        precision=condition.precision,
    )
    bench = Bench.build(settled, device)
    steps = rival_steps(condition, bench)
    once = condition.rivals == "predecessor_model"
    seconds = time_interleaved(
        steps,
        seconds=settings.seconds,
        min_rounds=1 if once else settings.min_rounds,
        warm_up=0 if once else 3,
        seed=settings.seed,
        device=device,
    )
    return {
        **asdict(condition),
        **summary(seconds, condition.base),
        "memory_bytes": {} if once else {n: peak_bytes(step, device) for n, step in steps.items()},
        "load": round(os.getloadavg()[0], 1),
        "command": command_line(),
        "versions": package_versions(),
        "seed": settings.seed,
    }


def rival_steps(condition: Condition, bench: Bench) -> dict[str, Callable[[], object]]:
    """Return the steps of a condition by name."""
    if condition.rivals in _OURS:
        losses = LOSSES if condition.rivals == "losses" else EXTENSIONS
        return {name: bench.step(loss) for name, loss in losses.items()}
    trainer, labels = bench.trainer, bench.labels
    tapped = HookableModel(trainer.model)
    pictures = bench.images[:, 0].float() / 255

    def predecessor(reach: Reach) -> Callable[[], object]:
        def run() -> object:
            x = trainer.preprocess(bench.images)
            return predecessor_step(
                tapped, trainer.step.optimizer, x, pictures, labels, reach=reach
            )

        return run

    def library() -> object:
        from studies.baselines.library import training_step

        return training_step(
            tapped, trainer.step.optimizer, trainer.preprocess(bench.images), labels
        )

    ours: dict[str, Callable[[], object]] = {BCPL: bench.step(LOSSES[BCPL])}
    if condition.rivals == "predecessor_model":
        return ours | {"predecessor, through the model": predecessor("model")}
    return ours | {
        "predecessor, to the features": predecessor("features"),
        "pytorch-grad-cam beside cross-entropy": library,
    }


def summary(seconds: Seconds, base: str) -> dict[str, Any]:
    """Return medians in milliseconds and paired ratios to `base`, by clock and rival."""
    return {
        "rounds": len(seconds["wall"][base]),
        "milliseconds": {
            clock: {name: round(float(np.median(t)) * 1e3, 3) for name, t in times.items()}
            for clock, times in seconds.items()
        },
        "ratios": {
            clock: {
                name: median_ratio(t, times[base]).as_list()
                for name, t in times.items()
                if name != base
            }
            for clock, times in seconds.items()
        },
    }


def target(rival: str) -> float:
    """Return the target of a step with this loss: its ratio to a step of cross-entropy."""
    name, metric = rival.split(", ")
    return TARGETS["SSIM"] if metric == "SSIM" else TARGETS[name]


def main(settings: Steps) -> None:
    """Measure the missing conditions; write table and figure of all."""
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    commit = git_commit()  # Of the code that is loaded, whatever is committed meanwhile.
    path = settings.out / "steps.json"
    kept: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for condition in conditions(settings):
        asked = asdict(condition)
        old = [entry for entry in kept if asked.items() <= entry.items()]
        if old and old[-1]["git_commit"] == commit and not settings.again:
            continue
        entry = {**measure(condition, settings), "git_commit": commit}
        kept = [other for other in kept if other not in old] + [entry]
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(kept, indent=1) + "\n")
        partial.replace(path)
        print(*table([entry], settings.clock), sep="\n", flush=True)
    kept.sort(key=_place)
    (settings.out / "steps.md").write_text("\n".join(table(kept, settings.clock)) + "\n")
    save(draw(kept, settings.clock), settings.out / "steps.png")


def _place(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return the sort key of a condition: small models first."""
    backbone = entry["backbone"]
    rank = BACKBONES.index(backbone) if backbone in BACKBONES else len(BACKBONES)
    return (
        get_args(Rivals).index(entry["rivals"]),
        (rank, backbone),
        entry["mode"] != "eager",
        entry["precision"] != "fp32",
    )


def table(entries: list[dict[str, Any]], clock: str) -> list[str]:
    """Return the lines of a Markdown table: a row per rival, with targets where there are any."""
    assert clock in CLOCKS
    lines = [
        f"| model | condition | batch | step | {clock} ms | ratio to baseline (95 % interval) "
        "| target | target met | peak memory, ratio to baseline |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        base = CROSS_ENTROPY if entry["rivals"] in _OURS else BCPL
        where = f"{entry['mode']}, {entry['precision']}, threads {entry['threads']}"
        memory = entry["memory_bytes"]
        for name, milliseconds in entry["milliseconds"][clock].items():
            lead = f"| {entry['backbone']} | {where} | {entry['batch_size']} | {name} |"
            if name == base:
                lines.append(f"{lead} {milliseconds:.1f} | 1 | | | |")
                continue
            median, low, high = entry["ratios"][clock][name]
            if entry["rivals"] == "losses":
                limit = target(name)
                wanted, met = f"≤ {limit}", median <= limit
            else:
                least = SPEEDUPS.get((name.split(maxsplit=1)[0].rstrip(","), entry["backbone"]))
                wanted, met = (f"≥ {least:g}", median >= least) if least else ("", False)
            share = f"{memory[name] / memory[base]:.3f}" if memory else ""
            lines.append(
                f"{lead} {milliseconds:.1f} | {median:.3f} ({low:.3f} to {high:.3f}) | {wanted} "
                f"| {('yes' if met else 'no') if wanted else ''} | {share} |"
            )
    return lines


def draw(entries: list[dict[str, Any]], clock: str) -> Figure:
    """Return the figure: each loss's step relative to cross-entropy, with its interval."""
    shown = [entry for entry in entries if entry["rivals"] == "losses"]
    names = [name for name in LOSSES if name != CROSS_ENTROPY]
    figure = Figure(figsize=(9, 1.2 + 0.55 * len(shown)), layout="constrained")
    axis = figure.subplots()
    for offset, name in enumerate(names):
        rows = np.array([entry["ratios"][clock][name] for entry in shown]).reshape(-1, 3)
        height = np.arange(len(shown)) + (offset - len(names) / 2 + 0.5) * 0.11
        spread = np.abs(rows[:, 1:].T - rows[:, 0])
        axis.errorbar(rows[:, 0], height, xerr=spread, fmt="o", ms=4, lw=1, label=name)
    axis.axvline(1, color="grey", lw=1)
    axis.axvline(TARGETS["BCPL"], color="grey", lw=1, ls=":")
    axis.set_yticks(
        range(len(shown)),
        [f"{e['backbone']}, threads {e['threads']}\n{e['mode']}, {e['precision']}" for e in shown],
        fontsize=8,
    )
    axis.invert_yaxis()
    axis.set_xlabel(f"{clock} time of a step over one of cross-entropy (median and 95 % interval)")
    figure.legend(fontsize=8, loc="outside upper center", ncols=3)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Steps))
