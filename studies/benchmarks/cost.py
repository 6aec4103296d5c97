"""Measure the cost of models and losses: parameters, operations, and images per second.

python -m studies.benchmarks.cost --out results/paper

The paper's Section 4.1 states that the number of parameters does not change and that training
GFLOPs are virtually identical. PyTorch's FlopCounterMode counts the operations of convolutions and
matrix products; a multiplication and an addition are two operations. Images per second are from
interleaved steps (see `studies.benchmarks.pairs`).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from batchcam.devices import resolve_device
from batchcam.provenance import command_line, git_commit, package_versions
from studies.benchmarks.batches import CROSS_ENTROPY, LOSSES, Bench, config
from studies.benchmarks.pairs import time_interleaved
from studies.benchmarks.steps import BACKBONES, BCPL, Condition, rival_steps

_LOSSES = (CROSS_ENTROPY, "Prototype Loss, L1", "Prototype Loss, SSIM", BCPL, "BCPL, SSIM")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Count operations and time the steps of models and losses."""

    out: Path
    """Output folder for cost.json and cost.md."""
    backbones: tuple[str, ...] = BACKBONES
    """Models; ConvNeXt models use a quarter of the batch size."""
    batch_size: int = 128
    """Images per batch."""
    seconds: float = 20.0
    """Time limit for each model's steps; 0 counts operations only."""
    threads: int = 2
    """PyTorch threads."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""


def main(settings: Cost) -> None:
    """Measure each model; write cost.json and cost.md."""
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    entries = [measure(settings, backbone) for backbone in settings.backbones]
    origin = {
        "command": command_line(),
        "git_commit": git_commit(),
        "versions": package_versions(),
        "threads": settings.threads,
    }
    path = settings.out / "cost.json"
    path.write_text(json.dumps({"models": entries, **origin}, indent=1) + "\n")
    (settings.out / "cost.md").write_text("\n".join(table(entries)) + "\n")


def measure(settings: Cost, backbone: str) -> dict[str, Any]:
    """Return a model's entry in cost.json."""
    large = backbone.startswith("convnext")
    batch_size = max(1, settings.batch_size // 4) if large else settings.batch_size
    device = resolve_device(settings.device)
    bench = Bench.build(config(backbone, batch_size), device)
    steps: dict[str, Callable[[], object]] = {name: bench.step(LOSSES[name]) for name in _LOSSES}
    rivals = Condition(
        "baselines", backbone, "eager", "fp32", batch_size, settings.threads, settings.device
    )
    steps |= {name: step for name, step in rival_steps(rivals, bench).items() if name != BCPL}
    x = bench.trainer.preprocess(bench.images)
    with torch.no_grad():
        forward = operations(lambda: bench.trainer.model(x))
    timed = (
        time_interleaved(steps, seconds=settings.seconds, min_rounds=5, warm_up=1, device=device)[
            "wall"
        ]
        if settings.seconds
        else {}
    )
    return {
        "backbone": backbone,
        "batch_size": batch_size,
        "resolution": bench.trainer.config.resolution,
        "grid": list(bench.trainer.grid),
        "parameters": sum(weights.numel() for weights in bench.trainer.model.parameters()),
        "forward_gflops": forward / batch_size / 1e9,
        "training_gflops": {
            name: operations(step) / batch_size / 1e9 for name, step in steps.items()
        },
        "images_per_second": {
            name: batch_size / float(np.median(seconds)) for name, seconds in timed.items()
        },
        "settings": {**asdict(settings), "out": None},
    }


def operations(run: Callable[[], object]) -> int:
    """Return the floating-point operations of the convolutions and matrix products in `run`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def table(entries: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table, one row per model and step."""
    lines = [
        "| model | parameters | forward pass, MFLOPs per image | step "
        "| training step, MFLOPs per image | ratio to cross-entropy | images/s |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for entry in entries:
        lead = [
            entry["backbone"],
            f"{entry['parameters']:,}",
            f"{1e3 * entry['forward_gflops']:.2f}",
        ]
        base = entry["training_gflops"][CROSS_ENTROPY]
        for name, gflops in entry["training_gflops"].items():
            rate = entry["images_per_second"].get(name)
            cells = [
                name,
                f"{1e3 * gflops:.2f}",
                f"{gflops / base:.4f}",
                f"{rate:.0f}" if rate else "",
            ]
            lines.append(f"| {' | '.join([*lead, *cells])} |")
            lead = ["", "", ""]
    return lines


if __name__ == "__main__":
    main(tyro.cli(Cost))
