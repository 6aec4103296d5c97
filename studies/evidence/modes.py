"""Classes of several looks: does a prototype for each of them help?

python -m studies.evidence.modes --out results/modes

The paper expects its class means to fail where a class has several modes (Section 5). Here classes
have two by construction: digits are merged in pairs, 0 with 1, 2 with 3 and so on, and models
learn the five pairs. Mean prototypes then show two digits on top of each other; k-means, which is
not told of the digits either, makes two prototypes for each pair. Both are judged by what neither
was given: how much the CAM of an image resembles the mean of the images of its own digit, beyond
that of the other digit of its pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchcam import figures
from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData, load_data
from batchcam.data.prepared import PreparedData, with_prototypes
from batchcam.data.preprocessing import to_device
from batchcam.data.splits import Split
from batchcam.prototypes import class_prototypes, resize_prototypes
from batchcam.similarity import ssim
from batchcam.training.evaluate import Evaluator
from studies.cli import run_command
from studies.evidence.measures import diversity
from studies.evidence.runs import Run, complete, finished, state_of
from studies.evidence.tables import Column, intervals, markdown, titles, values, write_csv
from studies.evidence.training import evaluate_test, train
from studies.evidence.workers import Workers

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
"""Test images whose explanations are judged, the first ones."""


@dataclass(frozen=True, kw_only=True)
class Modes:
    """Train on merged classes with one prototype and with several."""

    out: Path
    """Folder for runs/, modes.md, modes.csv and modes.png."""
    dataset: str = "mnist"
    """Whose classes are merged in pairs."""
    methods: tuple[str, ...] = tuple(METHODS)
    """What to train; weights are fixed, not searched."""
    seeds: int = 3
    """Of each method."""
    epochs: int = 2
    """Of each run."""
    precision: str = "bf16"
    """fp32, bf16 or fp16."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: Workers = field(default_factory=Workers)


def main(settings: Modes) -> None:
    """Make the runs; write the table and the figure."""
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
    """Return the data with classes merged in pairs, neighbour with neighbour."""

    def pairs(split: Split) -> Split:
        return replace(split, labels=split.labels // _MERGED)

    names = tuple(
        " or ".join(data.class_names[start : start + _MERGED])
        for start in range(0, data.num_classes, _MERGED)
    )
    return replace(
        data,
        class_names=names,
        train=pairs(data.train),
        validation=pairs(data.validation),
        test=pairs(data.test),
    )


def train_and_judge(run: Run, models: Path) -> dict[str, float]:
    """Train a run; judge it and its explanations on the test split."""
    config, prepared = run.config, load_prepared(run.config.dataset, run.config.prototype)
    result = train(run, prepared, state_of(run, models))
    device = next(result.model.parameters()).device
    images, labels = to_device(prepared.dataset.test, device)
    seen = evaluate_test(result)
    some, evaluator = slice(_EXPLAINED), Evaluator(result.model, result.preprocess)
    _, maps = evaluator.explain(images[some], labels[some])
    digits, prototypes = _digits(config.dataset, config.resolution)
    own = ssim(maps, prototypes[digits[some]])
    other = ssim(maps, prototypes[_partner(digits[some])])
    return {
        "validation_accuracy": result.metrics["val_accuracy"],
        "test_accuracy": seen.accuracy,
        "test_cam_ssim": seen.cam_ssim,
        "cam_ssim_ceiling": result.metrics["cam_ssim_ceiling"],
        "own_digit_ssim": own.mean().item(),
        "own_less_other_digit_ssim": (own - other).mean().item(),
        "diversity": diversity(maps, labels[some].cpu(), config.resolution),
        "seconds": sum(epoch["seconds"] for epoch in result.history),
    }


@lru_cache(maxsize=2)
def load_prepared(dataset: str, prototype: str) -> PreparedData:
    """Return a data set of merged classes and its prototypes, loaded once in a process."""
    config = TrialConfig(dataset=dataset, prototype=prototype, clusters=_MERGED)
    return with_prototypes(merged(load_data(config)), config)


@lru_cache(maxsize=2)
def _digits(dataset: str, resolution: int) -> tuple[Tensor, Tensor]:
    """Return the test images' classes before they were merged, and the prototypes of these."""
    data = load_data(TrialConfig(dataset=dataset))
    images, labels = to_device(data.train, torch.device("cpu"))
    prototypes = class_prototypes(images, labels, data.num_classes)
    return torch.from_numpy(data.test.labels), resize_prototypes(prototypes, resolution)


def _partner(digits: Tensor) -> Tensor:
    return digits + 1 - 2 * (digits % _MERGED)


_COLUMNS = {
    "test_accuracy": Column("test accuracy, %", scale=100),
    "own_digit_ssim": Column("image SSIM, own digit", 3),
    "own_less_other_digit_ssim": Column("less the other digit", 3),
    "test_cam_ssim": Column("SSIM, own prototypes", 3),
    "cam_ssim_ceiling": Column("its ceiling", 3),
    "diversity": Column("diversity"),
}


def write_tables(out: Path, made: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write modes.md and modes.csv: means over seeds with 95 % intervals of Student's t."""
    lines = [
        [runs[0]["study"], method, str(len(runs)), *intervals(_COLUMNS, runs)]
        for method, runs in made.items()
    ]
    header = ["data set", "method", "seeds", *titles(_COLUMNS)]
    (out / "modes.md").write_text(markdown(header, lines), encoding="utf-8")
    rows = [
        [run["study"], method, run["seed"], *values(_COLUMNS, run)]
        for method, runs in made.items()
        for run in runs
    ]
    write_csv(out / "modes.csv", [["study", "method", "seed", *_COLUMNS], *rows])


def draw(out: Path, runs: list[Run]) -> None:
    """Draw the prototypes of classes and of clusters, and each method's CAMs of single images."""
    data = load_prepared(runs[0].config.dataset, "mean").dataset
    digits, _ = _digits(runs[0].config.dataset, runs[0].config.resolution)
    # The first test image of each digit; those of a merged class stand beside each other.
    chosen = torch.stack(
        [(digits == digit).int().argmax() for digit in range(int(digits.max()) + 1)]
    )
    images, labels = to_device(data.test.take(chosen.numpy()), torch.device("cpu"))
    names = [data.class_names[label] for label in labels.tolist()]
    rows: list[figures.Row] = [("image", images.float().mean(dim=1) / 255, None)]
    for run in runs:
        config, prepared = run.config, load_prepared(run.config.dataset, run.config.prototype)
        result = train(run, prepared, state_of(run, out))
        groups = prepared.prototype_index("test")[chosen]
        if config.lambda_batch:
            wanted = prepared.prototypes("test", config.resolution)[groups]
            rows.append((f"{config.prototype}\nprototype", wanted, None))
        evaluator = Evaluator(result.model.cpu(), result.preprocess)
        _, maps = evaluator.explain(images, labels)
        rows.append((run.method.replace(", ", "\n"), maps, None))
    title = f"CAMs of single test images, {runs[0].config.dataset}, classes merged in pairs, seed 0"
    figures.save(figures.class_rows(rows, names, title), out / "modes.png")


if __name__ == "__main__":
    # By its own name: other processes do not find what is in this one's __main__.
    from studies.evidence import modes

    run_command(modes.main, modes.Modes)
