"""The Decoy study: do models attend to the class, or to a patch that gives it away?

python -m studies.evidence.right_reasons --out results/right_reasons

Each method's λ is chosen on validation images whose patches show random classes. The patches of the
test images show random classes too; the test images are read for the chosen λ only. Finished runs
are not repeated: an interrupted command resumes where it stopped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from batchcam.config import Precision, TrialConfig
from batchcam.data.decoys import paint_random_decoys
from batchcam.data.preprocessing import to_device
from batchcam.data.splits import Split
from batchcam.losses import used_terms
from batchcam.losses.cross_entropy import CROSS_ENTROPY
from batchcam.training.fit import TrialResult
from studies.commands import run_command
from studies.evidence.controls import CONTROLS, CORNERS_OUTSIDE, SIGHT_OUTSIDE
from studies.evidence.measures import explain, mass_share
from studies.evidence.runs import Run, complete, finished, state_of
from studies.evidence.tables import Column, intervals, paired, titles, values, write_csv
from studies.evidence.training import PENALTIES, RRR, RRR_BY_PROTOTYPES, load_prepared, train
from studies.evidence.workers import Workers
from studies.markdown import markdown_table

_EXPLAINED = 500
"""The number of test images whose explanations are measured."""
CLEAN = "cross-entropy, clean data"
ENERGY_CLEAN = "prototype energy, clean data"
EXCHANGE_CLEAN = "prototype exchange, clean data"
GIVEN_MASKS = "RRR, given the masks"
_CLEAN = (CLEAN, ENERGY_CLEAN, EXCHANGE_CLEAN)
"""Methods that are trained without decoys."""
_BEYOND = (*PENALTIES, *CONTROLS)
"""Keys of a run's `beyond`: settings beside the fields of its configuration."""
_COMPARED = (0.1, 1.0, 10.0, 100.0)
_EXCHANGED = (0.1, 0.3, 1.0, 3.0)
METHODS: Mapping[str, tuple[dict[str, Any], ...]] = {
    # Fields of TrialConfig and of _BEYOND, one entry for each λ that is tried.
    CLEAN: ({},),
    "cross-entropy": ({},),
    "Prototype Loss, SSIM": tuple({"metric": "ssim", "lambda_proto": w} for w in _COMPARED),
    "BCPL, L1": tuple({"lambda_batch": w} for w in _COMPARED),
    "BCPL, L1, median prototypes": tuple(
        {"lambda_batch": w, "prototype": "median"} for w in _COMPARED
    ),
    "BCPL, L1, HiResCAM": tuple({"lambda_batch": w, "cam": "hires_cam"} for w in _COMPARED),
    "prototype energy": tuple({"lambda_energy": w} for w in (3.0, 10.0, 30.0, 100.0, 300.0)),
    "prototype energy and BCPL, SSIM": tuple(
        {"lambda_energy": w, "lambda_batch": 0.1, "metric": "ssim", "prototype": "median"}
        for w in (1.0, 3.0, 10.0, 30.0, 100.0)
    ),
    "prototype exchange": tuple({"lambda_exchange": w} for w in _EXCHANGED),
    # The λ with the smallest loss of accuracy on both data sets, by the validation images.
    "prototype exchange, one λ for both": ({"lambda_exchange": 0.3},),
    "prototype exchange and BCPL, SSIM": tuple(
        {"lambda_exchange": w, "lambda_batch": 0.1, "metric": "ssim", "prototype": "median"}
        for w in _EXCHANGED
    ),
    # What our losses cost on clean data, and what they would achieve if supports excluded the
    # corners, or all cells whose receptive field contains a corner.
    EXCHANGE_CLEAN: tuple({"lambda_exchange": w} for w in _EXCHANGED),
    ENERGY_CLEAN: tuple({"lambda_energy": w} for w in (10.0, 30.0, 100.0)),
    "prototype exchange, told of the corners": tuple(
        {"lambda_exchange": w, CORNERS_OUTSIDE: 1.0} for w in _EXCHANGED
    ),
    "prototype energy, told of the corners": tuple(
        {"lambda_energy": w, CORNERS_OUTSIDE: 1.0} for w in (3.0, 10.0, 30.0, 100.0)
    ),
    "prototype energy, told of what sees the corners": tuple(
        {"lambda_energy": w, SIGHT_OUTSIDE: 1.0} for w in (3.0, 10.0, 30.0, 100.0)
    ),
    GIVEN_MASKS: tuple({RRR: w} for w in _COMPARED),
    # The prototype energy by pixels: masks from prototypes replace the annotation.
    "RRR, masks from prototypes": tuple({RRR_BY_PROTOTYPES: w} for w in (0.1, 1.0, 10.0)),
}


@dataclass(frozen=True, kw_only=True)
class RightReasons:
    """Train every method on images with decoys, and measure what it attends to."""

    out: Path
    """Output folder for runs/, decoy.md and decoy.csv."""
    datasets: tuple[Literal["mnist", "fashion_mnist"], ...] = ("mnist", "fashion_mnist")
    """Data sets that decoys are painted on."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to train."""
    seeds: int = 5
    """Number of seeds of the final runs; λ is chosen with seed 0."""
    epochs: int = 3
    """Epochs per run."""
    backbone: str = "simple_cnn"
    """Architecture of all runs."""
    precision: Precision = "bf16"
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: Workers = field(default_factory=Workers)
    table_only: bool = False
    """Train nothing; write the table of the finished runs."""


def main(settings: RightReasons) -> None:
    """Choose λ, make the final runs, and write the table."""
    settings.out.mkdir(parents=True, exist_ok=True)
    cells = list(product(settings.datasets, settings.methods))
    chosen = choose(settings, cells)
    # Seed by seed: if interrupted, all methods have equally many.
    final = [
        replace(run, stage="final", config=replace(run.config, seed=seed))
        for seed in range(settings.seeds)
        for run in chosen.values()
    ]
    _made(settings, final)
    rows = []
    for (dataset, _), run in chosen.items():
        own = [each for each in final if (each.study, each.method) == (run.study, run.method)]
        rows.append((dataset, run, finished(settings.out, own)))
    write_table(settings.out, rows)


def _made(settings: RightReasons, runs: list[Run]) -> list[dict[str, Any]]:
    if settings.table_only:
        return finished(settings.out, runs)
    judge = partial(train_and_judge, models=settings.out)
    return complete(settings.out, runs, judge, settings.workers)


def candidates(settings: RightReasons, dataset: str, method: str) -> list[Run]:
    """Return the runs that a method's λ is chosen from: one for each value."""
    study = dataset if method in _CLEAN else f"decoy_{dataset}"
    base = TrialConfig.from_dict(
        {
            "dataset": study,
            "backbone": settings.backbone,
            "epochs": settings.epochs,
            "precision": settings.precision,
            "device": settings.device,
            "lambda_batch": 0.0,
        }
    )
    return [
        Run(
            study=f"decoy_{dataset}",
            method=method,
            stage="selection",
            config=replace(base, **{name: v for name, v in fields.items() if name not in _BEYOND}),
            beyond={name: v for name, v in fields.items() if name in _BEYOND},
        )
        for fields in METHODS[method]
    ]


def choose(settings: RightReasons, cells: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Run]:
    """Return for each data set and method the candidate of the highest validation accuracy.

    A method with unfinished candidates is left out.
    """
    tried = {cell: candidates(settings, *cell) for cell in cells}
    _made(settings, [run for runs in tried.values() if len(runs) > 1 for run in runs])
    chosen = {}
    for cell, runs in tried.items():
        made = finished(settings.out, runs) if len(runs) > 1 else []
        if len(runs) == 1:
            chosen[cell] = runs[0]
        elif len(made) == len(runs):
            scores = [each["metrics"]["validation_accuracy_random_decoys"] for each in made]
            chosen[cell] = runs[int(np.argmax(scores))]
    return chosen


def train_and_judge(run: Run, models: Path) -> dict[str, float]:
    """Train and evaluate a run; a final run on the test images too."""
    prepared = load_prepared(run.config.dataset, run.config.prototype)
    result = train(run, prepared, state_of(run, models))
    clean = load_prepared(run.study.removeprefix("decoy_"), "mean").dataset
    validation = paint_random_decoys(clean.validation, clean.num_classes, np.random.default_rng(1))
    metrics = {
        "validation_accuracy_random_decoys": _accuracy(result, validation),
        "validation_accuracy": result.metrics["val_accuracy"],
        "cam_ssim": result.metrics["cam_ssim"],
        "cam_ssim_ceiling": result.metrics["cam_ssim_ceiling"],
        "seconds": sum(epoch["seconds"] for epoch in result.history),
    }
    if run.stage == "final":
        decoyed = load_prepared(run.study, run.config.prototype).dataset.test
        metrics |= {
            "test_accuracy_random_decoys": _accuracy(result, decoyed),
            "test_accuracy_clean": _accuracy(result, clean.test),
            **_on_patch(result, decoyed),
        }
    return metrics


def _on_patch(result: TrialResult, decoyed: Split) -> dict[str, float]:
    """Return the fraction of explanations on the patches, averaged over the first images."""
    some = decoyed.take(np.arange(min(_EXPLAINED, len(decoyed))))
    assert some.masks is not None
    masks = torch.from_numpy(some.masks)
    images, _ = to_device(some, torch.device("cpu"))
    found = explain(result.model.cpu(), images, result.preprocess)
    return {
        "attribution_on_patch": mass_share(found.evidence, masks).nanmean().item(),
        "cam_on_patch": mass_share(found.cams, masks).nanmean().item(),
        "integrated_gradients_on_patch": mass_share(found.integrated, masks).nanmean().item(),
        "cam_nil": (found.cams.amax(dim=(1, 2)) == 0).float().mean().item(),
    }


def _accuracy(result: TrialResult, split: Split) -> float:
    """Return the accuracy on a split, in the precision of the run's training."""
    prepared = result.prepared.with_splits(test=split)
    judged = prepared.split("test", result.config.resolution, result.device)
    return result.evaluator.evaluate(judged).accuracy


Row = tuple[str, Run, list[dict[str, Any]]]
_DECIDES = "test_accuracy_random_decoys"
_COMPARED_WITH = {
    CLEAN: "difference to clean data, points",
    GIVEN_MASKS: "difference to RRR, points",
}
"""Reference methods, and the titles of the columns of differences to each."""
_COLUMNS = {
    _DECIDES: Column("accuracy, decoy test, %", scale=100),
    "test_accuracy_clean": Column("accuracy, clean test, %", scale=100),
    "attribution_on_patch": Column("attribution on the patch, %", scale=100),
    "integrated_gradients_on_patch": Column("integrated gradients on the patch, %", scale=100),
    "cam_on_patch": Column("Grad-CAM on the patch, %", scale=100),
}


def write_table(out: Path, rows: list[Row]) -> None:
    """Write decoy.md and decoy.csv: means over seeds with Student's 95 % intervals.

    Differences are of the accuracy on the decoy test, paired by seed.
    """
    accuracies = {
        (dataset, chosen.method): {run["seed"]: run["metrics"][_DECIDES] for run in made}
        for dataset, chosen, made in rows
    }
    lines = []
    table: list[list[object]] = [["dataset", "method", "weights", "seed", *_COLUMNS]]
    for dataset, chosen, made in rows:
        lead = [dataset, chosen.method, ", ".join(_weights(chosen)) or "—"]
        own = accuracies[dataset, chosen.method]
        differences = []
        for other in _COMPARED_WITH:
            found = paired(own, accuracies.get((dataset, other), {}))
            differences.append(found.points if found and other != chosen.method else "")
        lines.append([*lead, str(len(made)), *intervals(_COLUMNS, made), *differences])
        table += [[*lead, run["seed"], *values(_COLUMNS, run)] for run in made]
    header = ["data set", "method", "λ", "seeds", *titles(_COLUMNS), *_COMPARED_WITH.values()]
    (out / "decoy.md").write_text(markdown_table(header, lines), encoding="utf-8")
    write_csv(out / "decoy.csv", table)


def _weights(run: Run) -> Iterator[str]:
    for spec, weight in used_terms(run.config):
        if spec != CROSS_ENTROPY:
            yield f"{spec.name} {weight:g}"
    yield from (f"{name} {value:g}" for name, value in run.beyond.items())


if __name__ == "__main__":
    # By its own name: other processes do not find what is in this one's __main__.
    from studies.evidence import right_reasons

    run_command(right_reasons.main, right_reasons.RightReasons)
