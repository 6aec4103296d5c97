"""Reproduce the paper's Figures 2 to 6: CAMs of each class, and CAMs of misclassified images.

python -m studies.evidence.pictures --out results/paper --conditions cross-entropy "BCPL, L1"

Uses the final runs of `studies.evidence.paper` with seed 0, on the test split. A run's saved model
is loaded; if it is missing, the model is trained again with the same configuration.
"""

from dataclasses import replace
from pathlib import Path

import torch

from batchcam import figures
from studies.commands import run_command
from studies.evidence.paper import Cell, Paper, cells_of, choose, final_runs
from studies.evidence.runs import state_of
from studies.evidence.training import evaluate_test, load_prepared, train


def main(settings: Paper) -> None:
    """Draw the figures of the final runs that have a file; takes the settings of the tables."""
    torch.set_num_threads(settings.workers.threads)
    folder = settings.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    cells = cells_of(settings)
    for study in dict.fromkeys(cell.study for cell in cells):
        draw(settings, [cell for cell in cells if cell.study == study], folder)


def draw(settings: Paper, cells: list[Cell], folder: Path) -> None:
    """Draw class CAMs and CAMs of misclassified images of one architecture on one data set."""
    rows: list[figures.Row] = []
    errors: list[figures.Row] = []
    for cell, chosen in choose(replace(settings, table_only=True), cells).items():
        run = final_runs(settings, cell, chosen)[0]
        if not run.path(settings.out).is_file():
            continue
        result = train(run, load_prepared(cell.dataset), state_of(run, settings.out))
        split = result.prepared.split("test", run.config.resolution, result.device)
        evaluation = evaluate_test(result)
        names = result.prepared.prototype_names
        error_cams, _ = result.evaluator.error_maps(split.images_NCHW, split.labels_N, len(names))
        if not rows:
            rows.append(("prototype", split.prototypes_PRR.cpu(), None))
        notes = [f"{value:.2f}" for value in evaluation.cam_ssim_P.tolist()]
        label = cell.condition.replace(", ", "\n")
        rows.append((f"{label}\nSSIM below", evaluation.maps_PRR, notes))
        wrong = figures.confusion_notes(evaluation.confusion_CC, names)
        errors.append((f"{label}\nerrors", error_cams, wrong))
    if not rows:
        return
    subject = f"{cells[0].study}, test images, seed 0"
    for name, figure_rows, title in (
        ("prototypes", rows, f"Class CAMs: {subject}"),
        ("errors", errors, f"CAMs of wrong answers: {subject}"),
    ):
        path = folder / f"{cells[0].study}_{name}.png"
        figures.save(figures.class_rows(figure_rows, names, title), path)


if __name__ == "__main__":
    run_command(main, Paper)
