"""Measure SimpleCNN's time to a target accuracy and SSIM, and that of a plain training script.

python -m studies.benchmarks.time_to_target --out results/speed

Trainer and plain script train on a data set, by default full MNIST, with the same objective,
optimiser, learning rates, splits and schedule. Each stops after the first epoch in which validation
accuracy and class-level SSIM of the validation CAMs reach their targets. `batchcam.fit` uses the
configuration given here. The plain script (`studies.baselines.plain`) loads images through
torchvision's transforms and a DataLoader, and computes in float32 in a separate process. Times
include training and evaluation, but not start-up.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from batchcam.config import Metric, Precision, TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.data.preprocessing import Preprocess
from batchcam.models import create_model
from batchcam.provenance import command_line, git_commit, package_versions
from batchcam.training.evaluate import Evaluator
from batchcam.training.fit import EpochReport, fit
from studies.baselines import plain
from studies.benchmarks.subprocess_worker import subprocess_worker


@dataclass(frozen=True, kw_only=True)
class TimeToTarget:
    """Measure the time to a target accuracy and SSIM."""

    out: Path
    """Output folder for time_to_target.json."""
    accuracy: float = 0.993
    """Target accuracy on the validation split."""
    ssim: float = 0.95
    """Target class-level SSIM between CAMs and prototypes of the validation split."""
    epochs: int = 4
    """Epochs of the one-cycle schedule, and the most to train."""
    precision: Precision = "bf16"
    """Precision of the trainer's forward pass."""
    batch_size: int = 128
    """Images per batch, for trainer and plain script."""
    learning_rate: float = TrialConfig.learning_rate
    """Peak learning rate, for trainer and plain script."""
    metric: Metric = "l1"
    """Metric of BCPL."""
    lambda_batch: float = 0.1
    """Weight of BCPL."""
    plain: bool = True
    """Measure the plain script too."""
    threads: int = 2
    """PyTorch threads, and workers of the plain script's data loader."""
    dataset: Literal["mnist", "fashion_mnist", "digits"] = "mnist"
    """Data set; the targets are chosen for mnist."""
    device: str = "cpu"
    """Device of the trainer: auto, cpu, cuda or cuda:N. The plain script runs on the CPU."""
    cuda_graphs: bool = True
    """Record the trainer's steps as CUDA graphs on a GPU."""
    seed: int = 0
    """Seed of trainer and plain script."""

    def config(self) -> TrialConfig:
        """Return the configuration of the trainer."""
        return TrialConfig(
            dataset=self.dataset,
            epochs=self.epochs,
            precision=self.precision,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            metric=self.metric,
            lambda_batch=self.lambda_batch,
            device=self.device,
            cuda_graphs=self.cuda_graphs,
            seed=self.seed,
        )

    def reached(self, accuracy: float, ssim: float) -> bool:
        """Return whether both targets are reached."""
        return accuracy >= self.accuracy and ssim >= self.ssim


def main(settings: TimeToTarget) -> None:
    """Measure, and append the entry to time_to_target.json."""
    torch.set_num_threads(settings.threads)
    prepared = prepare(settings.config())
    entry: dict[str, Any] = {"trainer": by_trainer(settings, prepared)}
    if settings.plain:
        with subprocess_worker(create_plain_script, settings, prepared) as worker:
            entry["plain"] = worker("plain script")
        if entry["trainer"]["reached"] and entry["plain"]["reached"]:
            entry["ratio"] = round(entry["plain"]["seconds"] / entry["trainer"]["seconds"], 3)
    entry |= {
        "settings": asdict(settings) | {"out": str(settings.out)},
        "load": round(os.getloadavg()[0], 1),
        "git_commit": git_commit(),
        "versions": package_versions(),
        "command": command_line(),
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "time_to_target.json"
    previous = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*previous, entry], indent=1) + "\n")


def by_trainer(settings: TimeToTarget, prepared: PreparedData) -> dict[str, Any]:
    """Train with `batchcam.fit`; return whether the targets were reached, seconds and metrics."""
    history: list[dict[str, float]] = []

    def on_epoch(report: EpochReport) -> bool:
        metrics = report.metrics
        history.append({name: metrics[name] for name in ("val_accuracy", "cam_ssim", "seconds")})
        print("trainer", history[-1], flush=True)
        return settings.reached(metrics["val_accuracy"], metrics["cam_ssim"])

    fit(settings.config(), on_epoch, prepared=prepared)
    return _outcome(settings, history)


def create_plain_script(
    settings: TimeToTarget, prepared: PreparedData
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the function of the worker process, by name."""
    torch.set_num_threads(settings.threads)
    return {"plain script": partial(by_plain_script, settings, prepared)}


def by_plain_script(settings: TimeToTarget, prepared: PreparedData) -> dict[str, Any]:
    """Train with the plain script; return the same fields as :func:`by_trainer`.

    The SSIM is computed by `batchcam.training.evaluate` and is not part of the measured time,
    because a plain script does not compute it.
    """
    config, data = settings.config(), prepared.dataset
    torch.manual_seed(config.seed)
    model = plain.plain_model(create_model(config.backbone, data.num_classes, data.channels))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    train, validation = (
        plain.loader(
            split,
            data.mean[0],
            data.std[0],
            config.batch_size,
            shuffle=split is data.train,
            workers=settings.threads,
        )
        for split in (data.train, data.validation)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=config.epochs * len(train) + 1
    )
    loss = plain.loss_function(config, prepared.prototypes("train", config.resolution))
    evaluator = Evaluator(model, Preprocess(config.resolution, data.mean, data.std))
    validation_split = prepared.split("validation", config.resolution)
    history: list[dict[str, float]] = []
    for _ in range(config.epochs):
        started = time.perf_counter()
        plain.train_epoch(model, train, optimizer, schedule, loss)
        accuracy = plain.accuracy(model, validation)
        seconds = time.perf_counter() - started
        evaluation = evaluator.evaluate(validation_split)
        history.append(
            {"val_accuracy": accuracy, "cam_ssim": evaluation.cam_ssim, "seconds": seconds}
        )
        print("plain script", history[-1], flush=True)
        if settings.reached(accuracy, evaluation.cam_ssim):
            break
    return _outcome(settings, history)


def _outcome(settings: TimeToTarget, history: list[dict[str, float]]) -> dict[str, Any]:
    """Return the entry of a run in time_to_target.json."""
    last = history[-1]
    return {
        "reached": settings.reached(last["val_accuracy"], last["cam_ssim"]),
        "seconds": round(sum(epoch["seconds"] for epoch in history), 1),
        "epochs": history,
    }


if __name__ == "__main__":
    main(tyro.cli(TimeToTarget))
