"""Compare the trainer's throughput with bare training steps and with a plain training script.

python -m studies.benchmarks.throughput --out results/speed

Each round measures, one after the other:

- bare steps: forward pass, backward pass and optimiser step of cross-entropy on one preprocessed
  batch;
- untuned bare steps: the same with PyTorch's and timm's defaults, in float32;
- an epoch of `batchcam.fit` with BCPL, with and without its evaluation;
- an epoch of a plain script (`studies.baselines.plain`) with the same loss;
- a forward pass over the images, and their evaluation.

Untuned steps and the plain script run in a separate process, because the trainer changes the
allocator settings of its process. The results are medians of ratios within a round.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from batchcam.config import Precision, TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import Preprocess, batches, to_device
from batchcam.data.splits import Split
from batchcam.devices import autocast, evaluation_batch, resolve_device
from batchcam.models import ExplainableModel, create_model, resolve_output_stride
from batchcam.provenance import command_line, git_commit, package_versions
from batchcam.training.fit import fit
from batchcam.training.recording import RecordedGradients
from batchcam.training.step import records_steps
from studies.baselines import plain
from studies.benchmarks.batches import Bench, random_data
from studies.benchmarks.pairs import median_ratio, timed
from studies.benchmarks.subprocess_worker import subprocess_worker


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Compare the trainer's images per second with bare steps and a plain script."""

    out: Path
    """Output folder for throughput.json and throughput.md."""
    backbones: tuple[str, ...] = ("simple_cnn", "resnet18", "convnextv2_tiny")
    """Models at 28x28; ConvNeXt models use a quarter of the batch size."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """Precisions of the trainer's forward pass; untuned steps and plain script use fp32."""
    batch_size: int = 128
    """Images per batch."""
    steps: int = 40
    """Steps per epoch of SimpleCNN; other models use a tenth of it."""
    rounds: int = 7
    """Rounds per model and precision."""
    threads: int = 2
    """PyTorch threads, and workers of the plain script's data loader."""
    plain: bool = True
    """Measure the plain script too; it runs for SimpleCNN on a CPU only."""
    cuda_graphs: bool = True
    """Record the steps as CUDA graphs on a GPU, the trainer's and the bare ones."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of weights and images."""


def main(settings: Throughput) -> None:
    """Measure each model and precision; replace their entries in throughput.json and .md."""
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "throughput.json"
    entries: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for backbone in settings.backbones:
        for precision in settings.precisions:
            entry = measure(settings, backbone, precision)
            key = ("backbone", "precision", "threads", "device")
            entries = [old for old in entries if any(old[name] != entry[name] for name in key)]
            entries.append(entry)
            path.write_text(json.dumps(entries, indent=1) + "\n")
            print(*table([entry]), sep="\n", flush=True)
    (settings.out / "throughput.md").write_text("\n".join(table(entries)) + "\n")


def measure(settings: Throughput, backbone: str, precision: Precision) -> dict[str, Any]:
    """Return the entry of a model and precision in throughput.json."""
    large = backbone.startswith("convnext")
    device = resolve_device(settings.device)
    config = TrialConfig(
        backbone=backbone,
        batch_size=settings.batch_size // 4 if large else settings.batch_size,
        precision=precision,
        epochs=1,
        lambda_batch=0.1,
        device=str(device),
        cuda_graphs=settings.cuda_graphs,
        seed=settings.seed,
    )
    steps = settings.steps if backbone == "simple_cnn" else max(2, settings.steps // 10)
    prepared = _prepared(steps * config.batch_size)
    fit(config, prepared=_prepared(config.batch_size))  # Warm up allocator and kernels.
    bare = _bare_step(config)
    with_plain = settings.plain and backbone == "simple_cnn" and device.type == "cpu"
    forward, evaluation = _evaluations(config, prepared)
    seconds: dict[str, list[float]] = {}

    def record(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    arguments = config, prepared, steps, settings.threads, with_plain
    with subprocess_worker(create_untuned, *arguments) as worker:
        for _ in range(settings.rounds):
            record("bare", timed(lambda: [bare() for _ in range(steps)], device))
            record("untuned", worker("untuned"))
            metrics = fit(config, prepared=prepared).metrics
            record("training", steps * config.batch_size / metrics["images_per_second"])
            record("epoch", metrics["seconds"])
            if with_plain:
                record("plain", worker("plain"))
            record("forward", timed(forward, device))
            record("evaluation", timed(evaluation, device))
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
    """Return random training images and a ninth as many validation images, as in real splits."""
    prepared = random_data(images, num_classes=10, side=28)
    count = max(16, images // 9)
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)
    validation = Split(pixels, np.arange(count) % 10)
    return prepared.with_splits(validation=validation)


def _bare_step(config: TrialConfig) -> Callable[[], None]:
    """Return a function that trains a tuned model once on one preprocessed batch.

    It is recorded where the trainer's step is.
    """
    bench = Bench.build(config, resolve_device(config.device))
    model, labels_N = bench.trainer.model, bench.labels
    x_NCHW = bench.trainer.preprocess(bench.images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    if not records_steps(config, bench.device):
        return _step(model, optimizer, x_NCHW, labels_N, config.precision)
    compute = RecordedGradients(
        lambda _: _gradients(model, optimizer, x_NCHW, labels_N, config.precision),
        model.parameters(),
    )

    def step() -> None:
        compute(labels_N)
        optimizer.step()

    return step


def _gradients(
    model: ExplainableModel,
    optimizer: torch.optim.Optimizer,
    x_NCHW: Tensor,
    labels_N: Tensor,
    precision: str,
) -> Tensor:
    """Replace the gradients by those of cross-entropy on a batch, and return it."""
    optimizer.zero_grad(set_to_none=True)
    with autocast(x_NCHW.device, precision):
        logits = model(x_NCHW)
    loss = F.cross_entropy(logits.float(), labels_N)
    torch.autograd.backward(loss)
    return loss.detach()


def _step(
    model: ExplainableModel,
    optimizer: torch.optim.Optimizer,
    x_NCHW: Tensor,
    labels_N: Tensor,
    precision: str,
) -> Callable[[], None]:
    """Return a function that takes one training step of cross-entropy."""

    def step() -> None:
        _gradients(model, optimizer, x_NCHW, labels_N, precision)
        optimizer.step()

    return step


def create_untuned(
    config: TrialConfig, prepared: PreparedData, steps: int, threads: int, with_plain: bool
) -> dict[str, Callable[[], object]]:
    """Return the functions of the worker process by name; each returns its seconds.

    "untuned" takes an epoch of bare steps in float32 with PyTorch's defaults. "plain", which exists
    if `with_plain` is set, trains an epoch of the plain script.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    data, device = prepared.dataset, resolve_device(config.device)
    stride = resolve_output_stride(config.backbone, config.resolution, data.channels)

    def untuned_model() -> ExplainableModel:
        model = create_model(config.backbone, data.num_classes, data.channels, stride)
        return plain.plain_model(model).to(device)

    bare = untuned_model()
    images, labels = to_device(data.train.take(np.arange(config.batch_size)), device)
    x_NCHW = Preprocess(config.resolution, data.mean, data.std)(images)
    step = _step(bare, torch.optim.AdamW(bare.parameters(), lr=1e-6), x_NCHW, labels, "fp32")
    step()
    functions: dict[str, Callable[[], object]] = {
        "untuned": partial(timed, lambda: [step() for _ in range(steps)], device)
    }
    if with_plain:
        epoch = _plain_epoch(untuned_model(), config, prepared, threads)
        functions["plain"] = partial(timed, epoch, device)
    return functions


def _plain_epoch(
    model: ExplainableModel, config: TrialConfig, prepared: PreparedData, workers: int
) -> Callable[[], object]:
    """Return a function that trains an epoch of the plain script; its loader is started."""
    data = prepared.dataset
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    loader = plain.loader(
        data.train, data.mean[0], data.std[0], config.batch_size, shuffle=True, workers=workers
    )
    loss = plain.loss_function(config, prepared.prototypes("train", config.resolution))
    for _ in loader:  # Start the workers.
        pass
    return lambda: plain.train_epoch(model, loader, optimizer, schedule, loss)


def _evaluations(
    config: TrialConfig, prepared: PreparedData
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two functions: a forward pass over the training images, and their evaluation."""
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
    """Return the lines of a Markdown table, one row per model and precision."""
    titles = {
        "training_of_bare": "training speed, relative to bare steps",
        "epoch_of_bare": "speed of training and evaluation, relative to bare steps",
        "over_untuned": "training speed, relative to untuned bare steps in fp32",
        "over_plain": "training speed, relative to a plain script",
        "evaluation_over_forward": "evaluation time, relative to a forward pass",
    }
    header = [f"{titles[name]} ({target})" for name, target in TARGETS.items()]
    lines = [
        "| model | precision | batch | images/s | " + " | ".join(header) + " |",
        "|---|---|---|---|" + "---|" * len(TARGETS),
    ]
    for entry in entries:
        cells = []
        for name in TARGETS:
            ratio = entry["ratios"].get(name)
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio) if ratio else "")
        speed = entry["images_per_second"]["training"]
        lead = f"| {entry['backbone']} | {entry['precision']} | {entry['batch_size']} | {speed:.0f}"
        lines.append(f"{lead} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Throughput))
