"""How near the trainer comes to what the model allows, how far from a plain script it is.

python -m studies.benchmarks.throughput --out results/speed

In each round, in turns: the bare step of cross-entropy (both passes and the optimiser on one batch
that lies there, normalised), and the same untuned, as PyTorch and timm have it by default; an epoch
of `batchcam.fit` with BCPL, and its evaluation; an epoch of a plain script
(`studies.baselines.plain`) with the same loss; a forward pass over the images, and their
evaluation. What is untuned, and the plain script, run in a process of their own, for the trainer
changes how its process allocates memory. What is reported are medians of ratios within a round.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import Preprocess, batches, to_device
from batchcam.data.splits import Split
from batchcam.devices import autocast, evaluation_batch, resolve_device
from batchcam.models import ExplainableModel, create_model, resolve_output_stride
from batchcam.provenance import command_line, git_commit, package_versions
from batchcam.training.fit import fit
from studies.baselines import plain
from studies.benchmarks.batches import Bench, random_data
from studies.benchmarks.elsewhere import elsewhere
from studies.benchmarks.pairs import median_ratio, timed


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Measure images per second of the trainer beside the bare step and a plain script."""

    out: Path
    """Folder for throughput.json and throughput.md."""
    backbones: tuple[str, ...] = ("simple_cnn", "resnet18", "convnextv2_tiny")
    """Models at 28x28; the larger ones have fewer images, ConvNeXt a quarter of the batch."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """Of the passes forwards; the plain script is in fp32."""
    batch_size: int = 128
    """Images in a batch."""
    steps: int = 40
    """Steps in an epoch of SimpleCNN; a tenth of it for the others."""
    rounds: int = 7
    """Rounds of each condition."""
    threads: int = 2
    """Of PyTorch, and workers of the plain script's loader."""
    plain: bool = True
    """Whether to run the plain script too, for SimpleCNN on a CPU."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Of weights and noise."""


def main(settings: Throughput) -> None:
    """Measure each condition; write what was measured, and a table of it."""
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "throughput.json"
    kept: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for backbone in settings.backbones:
        for precision in settings.precisions:
            entry = measure(settings, backbone, precision)
            same = ("backbone", "precision", "threads", "device")
            kept = [old for old in kept if any(old[name] != entry[name] for name in same)]
            kept.append(entry)
            path.write_text(json.dumps(kept, indent=1) + "\n")
            print(*table([entry]), sep="\n", flush=True)
    (settings.out / "throughput.md").write_text("\n".join(table(kept)) + "\n")


def measure(settings: Throughput, backbone: str, precision: str) -> dict[str, Any]:
    """Return the entry of one model in one precision."""
    large = backbone.startswith("convnext")
    device = resolve_device(settings.device)
    config = TrialConfig(
        backbone=backbone,
        batch_size=settings.batch_size // 4 if large else settings.batch_size,
        precision=precision,
        epochs=1,
        lambda_batch=0.1,
        device=str(device),
        seed=settings.seed,
    )
    steps = settings.steps if backbone == "simple_cnn" else max(2, settings.steps // 10)
    prepared = _prepared(steps * config.batch_size)
    fit(config, prepared=_prepared(config.batch_size))  # Warms up allocator and kernels.
    bare = _bare_step(config)
    with_plain = settings.plain and backbone == "simple_cnn" and device.type == "cpu"
    forward, evaluation = _evaluations(config, prepared)
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    given = config, prepared, steps, settings.threads, with_plain
    with elsewhere(start_untuned, *given) as other:
        for _ in range(settings.rounds):
            note("bare", timed(lambda: [bare() for _ in range(steps)], device))
            note("untuned", other("untuned"))
            metrics = fit(config, prepared=prepared).metrics
            note("training", steps * config.batch_size / metrics["images_per_second"])
            note("epoch", metrics["seconds"])
            if with_plain:
                note("plain", other("plain"))
            note("forward", timed(forward, device))
            note("evaluation", timed(evaluation, device))
    times = {name: np.array(values) for name, values in seconds.items()}
    pairs = {
        "training_of_bare": ("bare", "training"),
        "epoch_of_bare": ("bare", "epoch"),
        "over_untuned": ("untuned", "training"),
        "over_plain": ("plain", "training"),
        "evaluation_over_forward": ("evaluation", "forward"),
    }
    return {
        "backbone": backbone,
        "precision": precision,
        "threads": settings.threads,
        "device": str(device),
        "batch_size": config.batch_size,
        "steps": steps,
        "validation_images": len(prepared.dataset.validation),
        "images_per_second": {
            name: round(steps * config.batch_size / float(np.median(times[name])), 1)
            for name in ("bare", "untuned", "training", "epoch", "plain")
            if name in times
        },
        "ratios": {
            name: median_ratio(times[over], times[under]).as_list()
            for name, (over, under) in pairs.items()
            if over in times
        },
        "rounds": settings.rounds,
        "load": round(os.getloadavg()[0], 1),
        "seed": settings.seed,
        "config": asdict(config),
        "git_commit": git_commit(),
        "versions": package_versions(),
        "command": command_line(),
    }


def _prepared(images: int) -> PreparedData:
    """Return noise to train on, and a ninth of it to validate, as splits are cut."""
    prepared = random_data(images, num_classes=10, side=28)
    count = max(16, images // 9)
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)
    validation = Split(pixels, np.arange(count) % 10)
    return replace(prepared, dataset=replace(prepared.dataset, validation=validation))


def _bare_step(config: TrialConfig) -> Callable[[], None]:
    """Return both passes and the optimiser's step of cross-entropy, on a batch that lies there."""
    bench = Bench.build(config, resolve_device(config.device))
    x_NCHW = bench.trainer.preprocess(bench.images)
    optimizer = torch.optim.AdamW(bench.trainer.model.parameters(), lr=1e-6, fused=True)
    return _step(bench.trainer.model, optimizer, x_NCHW, bench.labels, config.precision)


def _step(
    model: ExplainableModel,
    optimizer: torch.optim.Optimizer,
    x_NCHW: Tensor,
    labels_N: Tensor,
    precision: str,
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(x_NCHW.device, precision):
            logits = model(x_NCHW)
        torch.autograd.backward(F.cross_entropy(logits.float(), labels_N))
        optimizer.step()

    return step


def start_untuned(
    config: TrialConfig, prepared: PreparedData, steps: int, threads: int, with_plain: bool
) -> dict[str, Callable[[], object]]:
    """Return what runs beside: bare steps as PyTorch has them, in fp32, and the plain script."""
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    data, device = prepared.dataset, resolve_device(config.device)
    stride = resolve_output_stride(config.backbone, config.resolution, data.channels)

    def model() -> ExplainableModel:
        made = create_model(config.backbone, data.num_classes, data.channels, stride)
        return plain.plain_model(made).to(device)

    bare = model()
    images, labels = to_device(data.train.take(np.arange(config.batch_size)), device)
    x_NCHW = Preprocess(config.resolution, data.mean, data.std)(images)
    step = _step(bare, torch.optim.AdamW(bare.parameters(), lr=1e-6), x_NCHW, labels, "fp32")
    step()
    runs: dict[str, Callable[[], object]] = {
        "untuned": partial(timed, lambda: [step() for _ in range(steps)], device)
    }
    if with_plain:
        epoch = _plain_epoch(model(), config, prepared, threads)
        runs["plain"] = partial(timed, epoch, device)
    return runs


def _plain_epoch(
    model: ExplainableModel, config: TrialConfig, prepared: PreparedData, workers: int
) -> Callable[[], object]:
    data = prepared.dataset
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    loader = plain.loader(
        data.train, data.mean[0], data.std[0], config.batch_size, shuffle=True, workers=workers
    )
    loss = plain.loss_function(config, prepared.prototypes("train", config.resolution))
    for _ in loader:  # Starts the workers.
        pass
    return lambda: plain.train_epoch(model, loader, optimizer, schedule, loss)


def _evaluations(
    config: TrialConfig, prepared: PreparedData
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a forward pass over the training images, and their evaluation."""
    result = fit(config, lambda _: True, prepared=_prepared(config.batch_size))
    model, preprocess = result.model, result.preprocess
    device = resolve_device(config.device)
    # The training images, for they are many; the prototypes do not matter to the time.
    split = prepared.split("train", config.resolution, device)
    evaluator = result.evaluator

    def forward() -> None:
        with torch.no_grad(), autocast(device, config.precision):
            for (batch,) in batches((split.images_NCHW,), evaluation_batch(device)):
                model(preprocess(batch)).argmax(dim=1)

    def evaluation() -> None:
        evaluator.evaluate(split)

    return forward, evaluation


TARGETS = {
    "training_of_bare": "≥ 0.95",
    "epoch_of_bare": "≥ 0.95",
    "over_untuned": "≥ 2 on convnextv2_tiny",
    "over_plain": "≥ 2",
    "evaluation_over_forward": "≤ 1.3",
}


def table(entries: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table, a row for each model and precision."""
    words = {
        "training_of_bare": "training, of bare steps",
        "epoch_of_bare": "with evaluation, of bare steps",
        "over_untuned": "training, over bare steps in fp32 untuned",
        "over_plain": "training, over a plain script",
        "evaluation_over_forward": "evaluation, over a forward pass",
    }
    heads = [f"{words[name]} ({wanted})" for name, wanted in TARGETS.items()]
    lines = [
        "| model | precision | batch | images/s | " + " | ".join(heads) + " |",
        "|---|---|---|---|" + "---|" * len(TARGETS),
    ]
    for entry in entries:
        cells = []
        for name in TARGETS:
            found = entry["ratios"].get(name)
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*found) if found else "")
        speed = entry["images_per_second"]["training"]
        lead = f"| {entry['backbone']} | {entry['precision']} | {entry['batch_size']} | {speed:.0f}"
        lines.append(f"{lead} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Throughput))
