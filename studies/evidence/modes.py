"""Compare one prototype per class with k-means prototypes on classes that have two modes.

python -m studies.evidence.modes --out results/modes

The paper expects class-mean prototypes to fail where a class has several modes (Section 5). This
study builds such classes: digits are merged in pairs (0 with 1, 2 with 3, and so on) and models
learn the five pairs. A class-mean prototype then superimposes two digits. k-means makes two
prototypes per pair without access to the digit labels. Both are evaluated by a measure that uses
the digit labels, which no model is trained on: the SSIM of an image's CAM to the mean image of its
own digit, minus the SSIM to the mean image of the other digit of the pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchcam import figures
from batchcam.config import Dataset, Precision, TrialConfig
from batchcam.data.dataset import ImageData, load_data
from batchcam.data.prepared import PreparedData, with_prototypes
from batchcam.data.preprocessing import to_device
from batchcam.data.splits import Split
from batchcam.prototypes import class_prototypes, resize_prototypes
from batchcam.similarity import ssim
from batchcam.training.evaluate import Evaluator
from studies.commands import run_command
from studies.evidence.measures import diversity
from studies.evidence.runs import Run, complete, finished, state_of
from studies.evidence.tables import Column, intervals, titles, values, write_csv
from studies.evidence.training import evaluate_test, train
from studies.evidence.workers import Workers
from studies.markdown import markdown_table

METHODS: Mapping[str, dict[str, Any]] = {
    "cross-entropy": {"lambda_batch": 0.0},
    "BCPL, L1, class means": {},
    "BCPL, L1, k-means": {"prototype": "kmeans"},
    "Prototype Loss, L1, class means": {"lambda_batch": 0.0, "lambda_proto": 1.0},
    "Prototype Loss, L1, k-means": {
        "lambda_batch": 0.0,
        "lambda_proto": 1.0,
        "prototype": "kmeans",
    },
}
_MERGED = 2
_EXPLAINED = 2000
"""The number of test images whose explanations are evaluated; the first ones are taken."""


@dataclass(frozen=True, kw_only=True)
class Modes:
    """Train on merged classes with one prototype per class and with several."""

    out: Path
    """Output folder for runs/, modes.md, modes.csv and modes.png."""
    dataset: Dataset = "mnist"
    """The data set whose classes are merged in pairs."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to train; loss weights are fixed, not searched."""
    seeds: int = 3
    """Number of seeds per method."""
    epochs: int = 2
    """Epochs per run."""
    precision: Precision = "bf16"
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: Workers = field(default_factory=Workers)


def main(settings: Modes) -> None:
    """Train and evaluate the missing runs, then write the table and the figure."""
    settings.out.mkdir(parents=True, exist_ok=True)
    runs = {
        method: [
            Run(
                study=f"{settings.dataset}_pairs",
                method=method,
                stage="final",
                config=TrialConfig(
                    dataset=settings.dataset,
                    epochs=settings.epochs,
                    precision=settings.precision,
                    device=settings.device,
                    clusters=_MERGED,
                    seed=seed,
                    **METHODS[method],
                ),
                beyond={"merged": _MERGED},
            )
            for seed in range(settings.seeds)
        ]
        for method in settings.methods
    }
    judge = partial(train_and_judge, models=settings.out)
    ordered = [runs[method][seed] for seed in range(settings.seeds) for method in runs]
    complete(settings.out, ordered, judge, settings.workers)
    write_tables(
        settings.out, {method: finished(settings.out, own) for method, own in runs.items()}
    )
    draw(settings.out, [own[0] for own in runs.values()])


def merged(data: ImageData) -> ImageData:
    """Return the data with neighbouring classes merged in pairs: 0 with 1, 2 with 3, and so on."""

    def merge_labels(split: Split) -> Split:
        return replace(split, labels=split.labels // _MERGED)

    names = tuple(
        " or ".join(data.class_names[start : start + _MERGED])
        for start in range(0, data.num_classes, _MERGED)
    )
    return replace(
        data,
        class_names=names,
        train=merge_labels(data.train),
        validation=merge_labels(data.validation),
        test=merge_labels(data.test),
    )


def train_and_judge(run: Run, models: Path) -> dict[str, float]:
    """Train a run's model and return its metrics on the test split, explanations included."""
    config, prepared = run.config, load_prepared(run.config.dataset, run.config.prototype)
    result = train(run, prepared, state_of(run, models))
    device = next(result.model.parameters()).device
    images, labels = to_device(prepared.dataset.test, device)
    evaluation = evaluate_test(result)
    explained, evaluator = slice(_EXPLAINED), Evaluator(result.model, result.preprocess)
    _, maps = evaluator.explain(images[explained], labels[explained])
    digits, prototypes = _digits(config.dataset, config.resolution)
    own = ssim(maps, prototypes[digits[explained]])
    other = ssim(maps, prototypes[_partner(digits[explained])])
    return {
        "validation_accuracy": result.metrics["val_accuracy"],
        "test_accuracy": evaluation.accuracy,
        "test_cam_ssim": evaluation.cam_ssim,
        "cam_ssim_ceiling": result.metrics["cam_ssim_ceiling"],
        "own_digit_ssim": own.mean().item(),
        "own_less_other_digit_ssim": (own - other).mean().item(),
        "diversity": diversity(maps, labels[explained].cpu(), config.resolution),
        "seconds": sum(epoch["seconds"] for epoch in result.history),
    }


@lru_cache(maxsize=2)
def load_prepared(dataset: str, prototype: str) -> PreparedData:
    """Return a data set of merged classes with its prototypes, cached per process."""
    config = TrialConfig.from_dict(
        {"dataset": dataset, "prototype": prototype, "clusters": _MERGED}
    )
    return with_prototypes(merged(load_data(config)), config)


@lru_cache(maxsize=2)
def _digits(dataset: str, resolution: int) -> tuple[Tensor, Tensor]:
    """Return the test images' labels before merging, and the class means before merging.

    Returns:
        int64 `(N,)`, and `(C, resolution, resolution)` from the training images.
    """
    data = load_data(TrialConfig.from_dict({"dataset": dataset}))
    images, labels = to_device(data.train, torch.device("cpu"))
    prototypes = class_prototypes(images, labels, data.num_classes)
    return torch.from_numpy(data.test.labels), resize_prototypes(prototypes, resolution)


def _partner(digits: Tensor) -> Tensor:
    """Return the other digit of each digit's pair."""
    return digits + 1 - 2 * (digits % _MERGED)


_COLUMNS = {
    "test_accuracy": Column("test accuracy, %", scale=100),
    "own_digit_ssim": Column("image SSIM, own digit", 3),
    "own_less_other_digit_ssim": Column("own minus other digit", 3),
    "test_cam_ssim": Column("SSIM, own prototypes", 3),
    "cam_ssim_ceiling": Column("SSIM ceiling", 3),
    "diversity": Column("diversity"),
}


def write_tables(out: Path, contents: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write modes.md, means over seeds with Student's t 95 % intervals, and modes.csv, each run."""
    lines = [
        [runs[0]["study"], method, str(len(runs)), *intervals(_COLUMNS, runs)]
        for method, runs in contents.items()
    ]
    header = ["data set", "method", "seeds", *titles(_COLUMNS)]
    (out / "modes.md").write_text(markdown_table(header, lines), encoding="utf-8")
    rows = [
        [run["study"], method, run["seed"], *values(_COLUMNS, run)]
        for method, runs in contents.items()
        for run in runs
    ]
    write_csv(out / "modes.csv", [["study", "method", "seed", *_COLUMNS], *rows])


def draw(out: Path, runs: list[Run]) -> None:
    """Draw modes.png: one test image per digit, its prototypes, and its CAM by each method."""
    data = load_prepared(runs[0].config.dataset, "mean").dataset
    digits, _ = _digits(runs[0].config.dataset, runs[0].config.resolution)
    # One image per digit, so that the two digits of a merged class are in neighbouring columns.
    chosen = torch.stack(
        [(digits == digit).int().argmax() for digit in range(int(digits.max()) + 1)]
    )
    images, labels = to_device(data.test.take(chosen.numpy()), torch.device("cpu"))
    names = [data.class_names[label] for label in labels.tolist()]
    rows: list[figures.Row] = [("image", images.float().mean(dim=1) / 255, None)]
    for run in runs:
        config, prepared = run.config, load_prepared(run.config.dataset, run.config.prototype)
        result = train(run, prepared, state_of(run, out))
        if config.lambda_batch:
            index = prepared.prototype_index("test")[chosen]
            prototypes = prepared.prototypes("test", config.resolution)[index]
            rows.append((f"{config.prototype}\nprototype", prototypes, None))
        evaluator = Evaluator(result.model.cpu(), result.preprocess)
        _, maps = evaluator.explain(images, labels)
        rows.append((run.method.replace(", ", "\n"), maps, None))
    title = f"CAMs of single test images, {runs[0].config.dataset}, classes merged in pairs, seed 0"
    figures.save(figures.class_rows(rows, names, title), out / "modes.png")


if __name__ == "__main__":
    # Imported by name: worker processes cannot unpickle functions defined in __main__.
    from studies.evidence import modes

    run_command(modes.main, modes.Modes)
