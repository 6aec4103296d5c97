"""Reproduce the paper's tables: seven losses, three architectures, two data sets.

python -m studies.evidence.paper --out results/paper                         # Table 1, SimpleCNN
python -m studies.evidence.paper --out results/paper --backbones resnet18 convnextv2_tiny
python -m studies.evidence.paper --out results/paper --resolution 112 --backbones resnet18
    --output-strides 32 16 8 --conditions cross-entropy "BCPL, L1"           # Table 2

For each architecture and data set, the learning rate is chosen first, with cross-entropy, by
validation accuracy. λ of each loss is chosen next, by the same criterion; both use shorter runs.
Only final runs read the test split. Their explanations are evaluated by measures that no training
loss optimises. Runs that have a file are not repeated: after an interruption the same command
resumes and fills the empty cells. Other resolutions use the learning rate and λ chosen at 28×28,
as the paper retrains its best configurations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from batchcam.config import Dataset, Precision, TrialConfig
from batchcam.data.preprocessing import to_device
from batchcam.models import create_model, resolve_output_stride
from batchcam.training.fit import TrialResult
from studies.commands import run_command
from studies.evidence import measures
from studies.evidence.runs import Run, complete, finished, state_of
from studies.evidence.tables import (
    Column,
    Paired,
    holm,
    interval,
    intervals,
    paired,
    titles,
    values,
    write_csv,
)
from studies.evidence.training import evaluate_test, load_prepared, train
from studies.evidence.workers import Workers
from studies.markdown import markdown_table

BASELINE = "cross-entropy"
LAMBDAS: Mapping[str, tuple[float, ...]] = {
    # Prototype Loss is a mean over images; BCPL is a sum over the classes of a batch.
    "lambda_proto": (0.1, 1.0, 10.0),
    "lambda_batch": (0.03, 0.1, 0.3),
}
CONDITIONS: Mapping[str, tuple[dict[str, Any], ...]] = {BASELINE: ({},)} | {
    f"{name}, {metric.upper()}": tuple(
        {"metric": metric, weight: value} for value in LAMBDAS[weight]
    )
    for name, weight in (("Prototype Loss", "lambda_proto"), ("BCPL", "lambda_batch"))
    for metric in ("l1", "l2", "ssim")
}
"""The compared losses: for each candidate λ, the fields of TrialConfig that define it."""

LEARNING_RATES = (1e-3, 3e-3, 6e-3)
EPOCHS: Mapping[str, int] = {"simple_cnn": 5, "resnet18": 5, "convnextv2_tiny": 3}
SELECTION_EPOCHS = 2
_RESOLUTION = 28
"""The resolution at which learning rate and λ are chosen."""
PUBLISHED: Mapping[tuple[str, int, str, str], float] = {
    # The paper's Tables 1 and 2: the best condition of each architecture, in percent.
    ("convnextv2_tiny", 28, "mnist", "BCPL, L1"): 99.72,
    ("convnextv2_tiny", 28, "mnist", BASELINE): 99.71,
    ("convnextv2_tiny", 28, "fashion_mnist", BASELINE): 94.79,
    ("resnet18", 28, "mnist", "BCPL, L2"): 99.65,
    ("resnet18", 28, "fashion_mnist", "BCPL, L2"): 94.99,
    ("resnet18", 28, "fashion_mnist", BASELINE): 94.82,
    ("simple_cnn", 28, "mnist", "BCPL, L1"): 99.00,
    ("simple_cnn", 28, "fashion_mnist", "BCPL, L1"): 91.32,
    ("convnextv2_tiny", 112, "mnist", "BCPL, L1"): 99.74,
    ("convnextv2_tiny", 112, "fashion_mnist", "BCPL, L1"): 95.01,
    ("resnet18", 112, "mnist", "BCPL, L1"): 99.71,
    ("resnet18", 112, "fashion_mnist", "BCPL, L1"): 94.99,
}
_EXPLAINED = 300
"""The number of test images whose explanations are evaluated; the first ones are taken."""
_IMPUTED = 60
"""The number of these images on which ROAD is computed."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Train the missing runs of a table of the paper and write the tables."""

    out: Path
    """Output folder: runs/, models/, accuracy_28.md, explanations_28.md, runs_28.csv."""
    backbones: tuple[str, ...] = ("simple_cnn",)
    """Architectures: simple_cnn, resnet18, convnextv2_tiny, or any timm model."""
    datasets: tuple[Dataset, ...] = ("mnist", "fashion_mnist")
    """Data sets, rows of the table."""
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    """Losses. The others are compared with the first one."""
    resolution: int = _RESOLUTION
    """Resolution of the final runs; learning rate and λ are always chosen at 28."""
    output_strides: tuple[int | None, ...] = (None,)
    """Output strides of the final runs, rows of the table; None: the resolution's default."""
    seeds: int = 5
    """Number of seeds of the final runs; learning rate and λ are chosen with seed 0."""
    epochs: int | None = None
    """Epochs of the final runs; None: 5, but 3 for ConvNeXt-V2-Tiny."""
    selection_epochs: int = SELECTION_EPOCHS
    """Epochs of the runs that choose learning rate and λ."""
    precision: Precision = "bf16"
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: Workers = field(default_factory=Workers)
    table_only: bool = False
    """Train nothing; write the tables from the runs that have a file."""


@dataclass(frozen=True)
class Cell:
    """A cell of the table: architecture, data set, loss, resolution and output stride."""

    backbone: str
    dataset: Dataset
    condition: str
    resolution: int = _RESOLUTION
    output_stride: int | None = None

    @property
    def selection(self) -> str:
        """Name of the study whose runs choose learning rate and λ."""
        return f"{self.dataset}_{self.backbone}"

    @property
    def study(self) -> str:
        """Name of the study whose final runs are compared with each other."""
        size = "" if self.resolution == _RESOLUTION else f"_{self.resolution}"
        return self.selection + size + (f"_{self.output_stride}" if self.output_stride else "")


def main(settings: Paper) -> None:
    """Choose learning rate and λ, execute the final runs, and write the tables."""
    settings.out.mkdir(parents=True, exist_ok=True)
    cells = cells_of(settings)
    chosen = choose(settings, cells)
    final = {cell: final_runs(settings, cell, run) for cell, run in chosen.items()}
    # Seed by seed, so that after an interruption all cells have about the same number of runs.
    _complete(settings, [runs[seed] for seed in range(settings.seeds) for runs in final.values()])
    rows = {cell: (chosen[cell], finished(settings.out, runs)) for cell, runs in final.items()}
    write_tables(settings.out, cells, rows)


def cells_of(settings: Paper) -> list[Cell]:
    """Return the table's cells, in the order of its rows."""
    return [
        Cell(backbone, dataset, condition, settings.resolution, stride)
        for backbone, dataset, stride, condition in product(
            settings.backbones, settings.datasets, settings.output_strides, settings.conditions
        )
    ]


def final_runs(settings: Paper, cell: Cell, chosen: Run) -> list[Run]:
    """Return the final runs of a cell, one per seed, with the chosen run's learning rate and λ."""
    config = replace(
        chosen.config,
        epochs=settings.epochs or EPOCHS.get(cell.backbone, 5),
        resolution=cell.resolution,
        output_stride=cell.output_stride,
    )
    return [
        replace(chosen, study=cell.study, stage="final", config=replace(config, seed=seed))
        for seed in range(settings.seeds)
    ]


def choose(settings: Paper, cells: Sequence[Cell]) -> dict[Cell, Run]:
    """Return the chosen run of each cell, by validation accuracy.

    Executes the missing candidates, unless `table_only` is set. A cell with a candidate that has
    no file is left out.
    """
    rates: dict[str, float] = {}
    candidates = {
        cell.selection: [_candidate(settings, cell, BASELINE, {}, rate) for rate in LEARNING_RATES]
        for cell in cells
    }
    _complete(settings, [run for runs in candidates.values() for run in runs])
    for study, runs in candidates.items():
        best = _best(settings.out, runs)
        if best is not None:
            rates[study] = best.config.learning_rate
    weighted = {
        cell: [
            _candidate(settings, cell, cell.condition, fields, rates[cell.selection])
            for fields in CONDITIONS[cell.condition]
        ]
        for cell in cells
        if cell.selection in rates
    }
    _complete(settings, [run for runs in weighted.values() if len(runs) > 1 for run in runs])
    chosen = {cell: _best(settings.out, runs) for cell, runs in weighted.items()}
    return {cell: run for cell, run in chosen.items() if run is not None}


def _candidate(
    settings: Paper, cell: Cell, condition: str, fields: Mapping[str, Any], rate: float
) -> Run:
    weights = {"lambda_batch": 0.0} | dict(fields)
    return Run(
        study=cell.selection,
        method=f"{condition}, rate {rate:g}",
        stage="selection",
        config=TrialConfig(
            dataset=cell.dataset,
            backbone=cell.backbone,
            learning_rate=rate,
            epochs=settings.selection_epochs,
            precision=settings.precision,
            device=settings.device,
            **weights,
        ),
    )


def _best(out: Path, runs: list[Run]) -> Run | None:
    """Return the run with the highest validation accuracy; None if a run has no file.

    A single run is returned without reading its file.
    """
    if len(runs) == 1:
        return runs[0]
    contents = finished(out, runs)
    if len(contents) < len(runs):
        return None
    scores = [content["metrics"]["validation_accuracy"] for content in contents]
    return runs[scores.index(max(scores))]


def _complete(settings: Paper, runs: list[Run]) -> None:
    """Execute the runs that have no file yet, unless only tables are requested."""
    if not settings.table_only:
        judge = partial(train_and_judge, models=settings.out)
        complete(settings.out, runs, judge, settings.workers)


def train_and_judge(run: Run, models: Path) -> dict[str, float]:
    """Train a run's model and return its metrics, those of the test split only for final runs."""
    prepared = load_prepared(run.config.dataset)
    result = train(run, prepared, state_of(run, models))
    metrics = {
        "validation_accuracy": result.metrics["val_accuracy"],
        "validation_cam_ssim": result.metrics["cam_ssim"],
        "cam_ssim_ceiling": result.metrics["cam_ssim_ceiling"],
        "seconds": sum(epoch["seconds"] for epoch in result.history),
    }
    return metrics | (_test_metrics(result) if run.stage == "final" else {})


def _test_metrics(result: TrialResult) -> dict[str, float]:
    """Return accuracy and explanation measures on the test split."""
    data, config = result.prepared.dataset, result.config
    images, _ = to_device(data.test, torch.device("cpu"))
    prototypes = result.prepared.prototypes("test", config.resolution)
    evaluation = evaluate_test(result)
    model, images = result.model.cpu(), images[:_EXPLAINED]
    explained = measures.explain(model, images, result.preprocess)
    cams, predicted = explained.cams, explained.predicted
    foreground = images.amax(dim=1) > 0
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + 1)
        stride = resolve_output_stride(
            config.backbone, config.resolution, data.channels, config.output_stride
        )
        fresh = create_model(config.backbone, data.num_classes, data.channels, stride)
    random = measures.randomisation(model, fresh, images, result.preprocess, cams, predicted)
    road = measures.road(
        model, images[:_IMPUTED], result.preprocess, cams[:_IMPUTED], predicted[:_IMPUTED]
    )

    def concentration(mass: torch.Tensor) -> float:
        return measures.concentration(mass, foreground).nanmean().item()

    gap = measures.prototype_gap(cams, predicted, prototypes)
    return {
        "test_accuracy": evaluation.accuracy,
        "test_cam_ssim": evaluation.cam_ssim,
        "test_cam_ssim_sample": evaluation.cam_ssim_sample,
        "prototype_gap": gap.nanmean().item(),
        "diversity": measures.diversity(cams, predicted, config.resolution),
        "cam_nil": (cams.amax(dim=(1, 2)) == 0).float().mean().item(),
        "cam_concentration": concentration(cams),
        "attribution_concentration": concentration(explained.evidence),
        "integrated_gradients_concentration": concentration(explained.integrated),
        "road": road.mean().item(),
        "cam_ssim_random_head": random.head,
        "cam_ssim_random_weights": random.everything,
    }


Rows = Mapping[Cell, tuple[Run, list[dict[str, Any]]]]
_EXPLANATIONS = {
    "test_cam_ssim": Column("class SSIM", 3),
    "cam_ssim_ceiling": Column("ceiling of class SSIM", 3),
    "test_cam_ssim_sample": Column("image SSIM", 3),
    "prototype_gap": Column("own − other SSIM", 3),
    "diversity": Column("diversity"),
    "cam_nil": Column("empty CAMs, %", 1, scale=100),
    "cam_concentration": Column("Grad-CAM on foreground"),
    "attribution_concentration": Column("attribution on foreground"),
    "integrated_gradients_concentration": Column("integrated gradients on foreground"),
    "road": Column("ROAD", 3),
    "cam_ssim_random_head": Column("SSIM, random head"),
    "cam_ssim_random_weights": Column("SSIM, random weights"),
}
_RUN_COLUMNS = (
    "backbone",
    "output_stride",
    "dataset",
    "loss",
    "weight",
    "learning_rate",
    "seed",
)


def write_tables(out: Path, cells: Sequence[Cell], rows: Rows) -> None:
    """Write accuracy_R.md, explanations_R.md and runs_R.csv of resolution R.

    Args:
        out: output folder.
        cells: all cells of the tables, of one resolution, in the order of the rows.
        rows: the chosen run and the contents of the final runs' files, for cells that have them;
            other cells stay empty.
    """
    size = cells[0].resolution
    header = ["architecture", "data set", "loss", "λ", "seeds", "test accuracy, %"]
    header += ["difference to first loss, points", "p", "p (Holm)", "paper, %"]
    (out / f"accuracy_{size}.md").write_text(
        markdown_table(header, list(_accuracy_rows(cells, rows))), encoding="utf-8"
    )
    lines = []
    for cell in cells:
        _, contents = rows.get(cell, (None, []))
        lead = [_model(cell), cell.dataset, cell.condition, str(len(contents))]
        lines.append([*lead, *intervals(_EXPLANATIONS, contents)])
    header = ["architecture", "data set", "loss", "seeds", *titles(_EXPLANATIONS)]
    (out / f"explanations_{size}.md").write_text(markdown_table(header, lines), encoding="utf-8")
    names = ["validation_accuracy", "test_accuracy", *_EXPLANATIONS]
    table: list[list[object]] = [[*_RUN_COLUMNS, *names]]
    for cell, (run, contents) in rows.items():
        rate = f"{run.config.learning_rate:g}"
        lead = [cell.backbone, str(cell.output_stride or ""), cell.dataset, cell.condition]
        lead += [_weight(run), rate]
        table += [[*lead, content["seed"], *values(names, content)] for content in contents]
    write_csv(out / f"runs_{size}.csv", table)


def _accuracy_rows(cells: Sequence[Cell], rows: Rows) -> Iterator[list[str]]:
    size = cells[0].resolution
    for study in dict.fromkeys(cell.study for cell in cells):
        block = [cell for cell in cells if cell.study == study]
        accuracies = {
            cell: {
                content["seed"]: content["metrics"]["test_accuracy"] for content in rows[cell][1]
            }
            for cell in block
            if cell in rows
        }
        baseline = accuracies.get(block[0], {})
        comparisons: dict[Cell, Paired] = {}
        for cell in block[1:]:
            comparison = paired(accuracies.get(cell, {}), baseline)
            if comparison is not None:
                comparisons[cell] = comparison
        p_values = [comparison.p for comparison in comparisons.values()]
        adjusted = dict(zip(comparisons, holm(p_values), strict=True))
        for cell in block:
            published = PUBLISHED.get((cell.backbone, size, cell.dataset, cell.condition))
            by_seed = accuracies.get(cell, {})
            difference = comparisons.get(cell)
            yield [
                _model(cell),
                cell.dataset,
                cell.condition,
                _weight(rows[cell][0]) if cell in rows else "",
                str(len(by_seed)),
                interval(list(by_seed.values()), 100),
                *(
                    [difference.points, f"{difference.p:.2g}", f"{adjusted[cell]:.2g}"]
                    if difference
                    else ["", "", ""]
                ),
                f"{published:.2f}" if published else "",
            ]


def _model(cell: Cell) -> str:
    return cell.backbone + (f", stride {cell.output_stride}" if cell.output_stride else "")


def _weight(run: Run) -> str:
    config = run.config
    value = config.lambda_proto or config.lambda_batch
    return f"{value:g}" if value else ""


if __name__ == "__main__":
    # Imported by name: worker processes cannot unpickle functions defined in __main__.
    from studies.evidence import paper

    run_command(paper.main, paper.Paper)
