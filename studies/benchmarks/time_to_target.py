"""How long SimpleCNN takes to an accuracy and an SSIM, beside a plain script.

python -m studies.benchmarks.time_to_target --out results/speed

Both train on full MNIST with the same objective, optimiser, learning rates and splits, to the same
number of epochs, and are stopped at the first one after which the validation split has the accuracy
and its class-level CAMs the SSIM. `batchcam.fit` computes as configured here; the plain script
(`studies.baselines.plain`) reads images through torchvision's transforms and a DataLoader, and
computes in float32, in a process of its own. Time is what training and evaluation take, start-up
excluded.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.data.preprocessing import Preprocess
from batchcam.models import create_model
from batchcam.provenance import command_line, git_commit, package_versions
from batchcam.training.evaluate import Evaluator
from batchcam.training.fit import EpochReport, fit
from studies.baselines import plain
from studies.benchmarks.elsewhere import elsewhere


@dataclass(frozen=True, kw_only=True)
class TimeToTarget:
    """Measure the time to an accuracy and an SSIM."""

    out: Path
    """Folder for time_to_target.json."""
    accuracy: float = 0.993
    """Of the validation split."""
    ssim: float = 0.95
    """Class-level, between CAMs and prototypes of the validation split."""
    epochs: int = 4
    """Of the one-cycle schedule."""
    precision: str = "bf16"
    """Of the trainer's passes forwards."""
    batch_size: int = 128
    """Images in a batch, of both."""
    learning_rate: float = TrialConfig.learning_rate
    """At the peak of the schedule, of both."""
    metric: str = "l1"
    """Of BCPL."""
    lambda_batch: float = 0.1
    """Weight of BCPL."""
    plain: bool = True
    """Whether to run the plain script too."""
    threads: int = 2
    """Of PyTorch, and workers of the plain script's loader."""
    seed: int = 0
    """Of both."""

    def config(self) -> TrialConfig:
        """Return the trainer's configuration."""
        return TrialConfig(
            dataset="mnist",
            epochs=self.epochs,
            precision=self.precision,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            metric=self.metric,
            lambda_batch=self.lambda_batch,
            device="cpu",
            seed=self.seed,
        )

    def reached(self, accuracy: float, ssim: float) -> bool:
        """Whether both targets are met."""
        return accuracy >= self.accuracy and ssim >= self.ssim


def main(settings: TimeToTarget) -> None:
    """Measure, and add what was measured to what is there."""
    torch.set_num_threads(settings.threads)
    prepared = prepare(settings.config())
    entry: dict[str, Any] = {"trainer": by_trainer(settings, prepared)}
    if settings.plain:
        with elsewhere(start_plain_script, settings, prepared) as other:
            entry["plain"] = other("plain script")
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
    kept = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*kept, entry], indent=1) + "\n")


def by_trainer(settings: TimeToTarget, prepared: PreparedData) -> dict[str, Any]:
    """Train with `batchcam.fit`; return the seconds, and what each epoch gave."""
    history: list[dict[str, float]] = []

    def on_epoch(report: EpochReport) -> bool:
        metrics = report.metrics
        history.append({name: metrics[name] for name in ("val_accuracy", "cam_ssim", "seconds")})
        print("trainer", history[-1], flush=True)
        return settings.reached(metrics["val_accuracy"], metrics["cam_ssim"])

    fit(settings.config(), on_epoch, prepared=prepared)
    return _outcome(settings, history)


def start_plain_script(
    settings: TimeToTarget, prepared: PreparedData
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the plain script's run, by name."""
    torch.set_num_threads(settings.threads)
    return {"plain script": partial(by_plain_script, settings, prepared)}


def by_plain_script(settings: TimeToTarget, prepared: PreparedData) -> dict[str, Any]:
    """Train with the plain script; return the same.

    The SSIM is computed by `batchcam.training.evaluate`, outside the time: a plain script has none.
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
    explained_split = prepared.split("validation", config.resolution)
    history: list[dict[str, float]] = []
    for _ in range(config.epochs):
        began = time.perf_counter()
        plain.train_epoch(model, train, optimizer, schedule, loss)
        accuracy = plain.accuracy(model, validation)
        seconds = time.perf_counter() - began
        explained = evaluator.evaluate(explained_split)
        history.append(
            {"val_accuracy": accuracy, "cam_ssim": explained.cam_ssim, "seconds": seconds}
        )
        print("plain script", history[-1], flush=True)
        if settings.reached(accuracy, explained.cam_ssim):
            break
    return _outcome(settings, history)


def _outcome(settings: TimeToTarget, history: list[dict[str, float]]) -> dict[str, Any]:
    last = history[-1]
    return {
        "reached": settings.reached(last["val_accuracy"], last["cam_ssim"]),
        "seconds": round(sum(epoch["seconds"] for epoch in history), 1),
        "epochs": history,
    }


if __name__ == "__main__":
    main(tyro.cli(TimeToTarget))
