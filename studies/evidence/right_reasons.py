"""The Decoy study: do models look at the class, or at a patch that gives it away?

python -m studies.evidence.right_reasons --out results/right_reasons

Each method's λ is chosen on validation images whose patches show random classes; the test images,
whose patches do too, are read for the chosen λ alone. Runs that are there are not made again:
stopped at any time, the same command goes on.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy import stats

from batchcam.config import TrialConfig
from batchcam.data import batches, to_device
from batchcam.decoy import paint_random_decoys
from batchcam.devices import resolve_device
from batchcam.evaluate import evaluate
from batchcam.inputs import Inputs, prepare
from batchcam.splits import Split
from batchcam.step import make_schedule
from batchcam.train import Trainer, TrialResult, fit
from studies.baselines.rrr import train_epoch
from studies.evidence.measures import mass_share
from studies.evidence.runs import Run, complete, finished

CLEAN = "cross-entropy, clean data"
METHODS: Mapping[str, tuple[dict[str, Any], ...]] = {
    # Fields of TrialConfig, a choice of them for each λ that is tried; "rrr" is no field of it.
    CLEAN: ({},),
    "cross-entropy": ({},),
    "Prototype Loss, SSIM": tuple(
        {"metric": "ssim", "lambda_proto": value} for value in (0.1, 1.0, 10.0)
    ),
    "BCPL, L1": tuple({"lambda_batch": value} for value in (0.1, 1.0, 10.0)),
    "BCPL, L1, median prototypes": tuple(
        {"lambda_batch": value, "prototype": "median"} for value in (0.1, 1.0, 10.0)
    ),
    "prototype energy": tuple({"lambda_energy": value} for value in (3.0, 10.0, 30.0)),
    "prototype energy and BCPL, SSIM": tuple(
        {"lambda_energy": value, "lambda_batch": 0.1, "metric": "ssim", "prototype": "median"}
        for value in (3.0, 10.0, 30.0)
    ),
    "RRR, given the masks": tuple({"rrr": value} for value in (1.0, 10.0, 100.0)),
}


@dataclass(frozen=True, kw_only=True)
class RightReasons:
    """Train every method on images with decoys, and see what it looks at."""

    out: Path
    """Folder for runs/, decoy.md and decoy.csv."""
    datasets: tuple[str, ...] = ("mnist", "fashion_mnist")
    """What decoys are painted on."""
    methods: tuple[str, ...] = tuple(METHODS)
    """What to train."""
    seeds: int = 5
    """Of the final runs; λ is chosen with seed 0."""
    epochs: int = 3
    """Of each run."""
    backbone: str = "simple_cnn"
    """Of all runs."""
    precision: str = "bf16"
    """fp32, bf16 or fp16."""
    threads: int = 2
    """Of PyTorch."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    table_only: bool = False
    """Train nothing; write the table of what is there."""


def main(settings: RightReasons) -> None:
    """Choose λ, make the final runs, and write the table."""
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for dataset in settings.datasets:
        for method in settings.methods:
            chosen = _choose(settings, dataset, method)
            if chosen is None:
                continue
            final = [
                replace(chosen, stage="final", config=replace(chosen.config, seed=seed))
                for seed in range(settings.seeds)
            ]
            make = finished if settings.table_only else _complete
            rows.append((dataset, chosen, make(settings.out, final)))
            write_table(settings.out, rows)


def candidates(settings: RightReasons, dataset: str, method: str) -> list[Run]:
    """Return the runs by which a method's λ is chosen: one for each value that is tried."""
    study = dataset if method == CLEAN else f"decoy_{dataset}"
    base = TrialConfig(
        dataset=study,
        backbone=settings.backbone,
        epochs=settings.epochs,
        precision=settings.precision,
        device=settings.device,
        lambda_batch=0.0,
    )
    return [
        Run(
            study=f"decoy_{dataset}",
            method=method,
            stage="selection",
            config=replace(base, **{name: v for name, v in fields.items() if name != "rrr"}),
            beyond={name: v for name, v in fields.items() if name == "rrr"},
        )
        for fields in METHODS[method]
    ]


def _choose(settings: RightReasons, dataset: str, method: str) -> Run | None:
    """Return the candidate of the highest validation accuracy; None if some are not made."""
    runs = candidates(settings, dataset, method)
    if len(runs) == 1:
        return runs[0]
    make = finished if settings.table_only else _complete
    made = make(settings.out, runs)
    if len(made) < len(runs):
        return None
    accuracies = [content["metrics"]["validation_accuracy_random_decoys"] for content in made]
    return runs[int(np.argmax(accuracies))]


def _complete(out: Path, runs: list[Run]) -> list[dict[str, Any]]:
    return complete(out, runs, _train_and_judge)


def _train_and_judge(run: Run) -> dict[str, float]:
    """Train a run and judge it, on the test images too if it is a final one."""
    inputs = _inputs(run.config.dataset, run.config.prototype)
    if run.beyond:
        result = _fit_rrr(run.config, inputs, run.beyond["rrr"])
    else:
        result = fit(run.config, inputs=inputs)
    clean = _inputs(run.study.removeprefix("decoy_"), "mean").data
    validation = paint_random_decoys(clean.validation, clean.num_classes, np.random.default_rng(1))
    metrics = {
        "validation_accuracy_random_decoys": _accuracy(result, validation),
        "validation_accuracy": result.metrics["val_accuracy"],
        "cam_ssim": result.metrics["cam_ssim"],
        "cam_ssim_ceiling": result.metrics["cam_ssim_ceiling"],
        "seconds": sum(epoch["seconds"] for epoch in result.history),
    }
    if run.stage == "final":
        decoyed = _inputs(run.study, run.config.prototype).data.test
        assert decoyed.masks is not None
        images, _ = to_device(decoyed, torch.device("cpu"))
        share = mass_share(
            result.model.cpu(), images, torch.from_numpy(decoyed.masks), result.preprocess
        )
        metrics |= {
            "test_accuracy_random_decoys": _accuracy(result, decoyed),
            "test_accuracy_clean": _accuracy(result, clean.test),
            "attribution_on_patch": share.attribution,
            "cam_on_patch": share.cam,
        }
    return metrics


def _fit_rrr(config: TrialConfig, inputs: Inputs, weight: float) -> TrialResult:
    """Train as :func:`batchcam.train.fit` does, but by RRR, which is told where the decoys are."""
    device = resolve_device(config.device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        trainer = Trainer(config, inputs, device)
    split = inputs.data.train
    assert split.masks is not None
    size = (config.resolution, config.resolution)
    masks_NRR = F.interpolate(torch.from_numpy(split.masks[:, None]).float(), size).squeeze(1)
    together = (*to_device(split, device), masks_NRR.to(device))
    steps = -(-len(split) // config.batch_size) * config.epochs
    schedule = make_schedule(trainer.step.optimizer, config, steps)
    generator = torch.Generator().manual_seed(config.seed)
    started = time.perf_counter()
    for _ in range(config.epochs):
        order = torch.randperm(len(split), generator=generator).to(device)
        prepared = (
            (trainer.preprocess(images), labels, masks)
            for images, labels, masks in batches(together, config.batch_size, order)
        )
        train_epoch(
            trainer.model, prepared, trainer.step.optimizer, schedule, weight, config.precision
        )
    evaluation = trainer.validate()
    trainer.history.append(
        {
            "epoch": config.epochs,
            "val_accuracy": evaluation.accuracy,
            "cam_ssim": evaluation.cam_ssim,
            "cam_ssim_ceiling": inputs.ceiling(config.resolution, trainer.grid).mean().item(),
            "seconds": time.perf_counter() - started,
        }
    )
    return trainer.result(evaluation)


@lru_cache(maxsize=4)
def _inputs(dataset: str, prototype: str) -> Inputs:
    return prepare(TrialConfig(dataset=dataset, prototype=prototype))


def _accuracy(result: TrialResult, split: Split) -> float:
    """Return the accuracy on a split, in the precision that the run was trained in."""
    device = next(result.model.parameters()).device
    images, labels = to_device(split, device)
    prototypes = result.inputs.prototypes("test", result.config.resolution).to(device)
    return evaluate(
        result.model,
        images,
        labels,
        prototypes,
        result.preprocess,
        precision=result.config.precision,
    ).accuracy


Row = tuple[str, Run, list[dict[str, Any]]]
_COLUMNS = {
    "test_accuracy_random_decoys": "decoy test, %",
    "test_accuracy_clean": "clean test, %",
    "attribution_on_patch": "attribution on the patch, %",
    "cam_on_patch": "Grad-CAM on the patch, %",
}


def write_table(out: Path, rows: list[Row]) -> None:
    """Write decoy.md and decoy.csv: means over seeds with 95 % intervals of Student's t."""
    lines = [
        "| data set | method | λ | seeds | " + " | ".join(_COLUMNS.values()) + " |",
        "|" + "---|" * (4 + len(_COLUMNS)),
    ]
    table = ["dataset,method,weights,seed," + ",".join(_COLUMNS)]
    for dataset, chosen, made in rows:
        weights, method = ", ".join(_weights(chosen)) or "—", chosen.method
        cells = [_interval([content["metrics"][name] for content in made]) for name in _COLUMNS]
        lines.append(f"| {dataset} | {method} | {weights} | {len(made)} | {' | '.join(cells)} |")
        for content in made:
            values = ",".join(f"{content['metrics'][name]:.6f}" for name in _COLUMNS)
            table.append(f'{dataset},"{method}","{weights}",{content["seed"]},{values}')
    (out / "decoy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "decoy.csv").write_text("\n".join(table) + "\n", encoding="utf-8")


def _weights(run: Run) -> Iterator[str]:
    for name in ("proto", "batch", "energy"):
        value = getattr(run.config, f"lambda_{name}")
        if value:
            yield f"{name} {value:g}"
    yield from (f"{name} {value:g}" for name, value in run.beyond.items())


def _interval(values: list[float]) -> str:
    """Return a mean in percent, with its interval where there are several values."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{100 * values[0]:.2f}"
    margin = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{100 * mean(values):.2f} ± {100 * margin:.2f}"


if __name__ == "__main__":
    main(tyro.cli(RightReasons))
