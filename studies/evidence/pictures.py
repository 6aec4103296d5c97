"""The paper's Figures 2 to 6: what models saw in each class, and in the images they got wrong.

python -m studies.evidence.pictures --out results/paper --conditions cross-entropy "BCPL, L1"

Of final runs of `studies.evidence.paper` with seed 0, on the test split: their kept models, or the
same trained again where these are gone.
"""

from dataclasses import replace
from pathlib import Path

import torch

from batchcam import figures
from studies.cli import run_command
from studies.evidence.paper import Cell, Paper, cells_of, choose, final_runs
from studies.evidence.runs import state_of
from studies.evidence.training import evaluate_test, load_prepared, train


def main(settings: Paper) -> None:
    """Draw the figures of the final runs that are there; settings are those of the table."""
    torch.set_num_threads(settings.workers.threads)
    folder = settings.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    cells = cells_of(settings)
    for study in dict.fromkeys(cell.study for cell in cells):
        draw(settings, [cell for cell in cells if cell.study == study], folder)


def draw(settings: Paper, cells: list[Cell], folder: Path) -> None:
    """Draw reconstructed prototypes and errors of one architecture on one data set."""
    rows: list[figures.Row] = []
    errors: list[figures.Row] = []
    for cell, chosen in choose(replace(settings, table_only=True), cells).items():
        run = final_runs(settings, cell, chosen)[0]
        if not run.path(settings.out).is_file():
            continue
        result = train(run, load_prepared(cell.dataset), state_of(run, settings.out))
        split = result.prepared.split("test", run.config.resolution, result.device)
        seen = evaluate_test(result)
        names = result.prepared.prototype_names
        misled, _ = result.evaluator.error_maps(split.images_NCHW, split.labels_N, len(names))
        if not rows:
            rows.append(("prototype", split.prototypes_PRR.cpu(), None))
        notes = [f"{value:.2f}" for value in seen.cam_ssim_P.tolist()]
        label = cell.condition.replace(", ", "\n")
        rows.append((f"{label}\nSSIM below", seen.maps_PRR, notes))
        wrong = figures.confusion_notes(seen.confusion_CC, names)
        errors.append((f"{label}\nerrors", misled, wrong))
    if not rows:
        return
    what = f"{cells[0].study}, test images, seed 0"
    for kind, lines, title in (
        ("prototypes", rows, f"Class CAMs: {what}"),
        ("errors", errors, f"CAMs of wrong answers: {what}"),
    ):
        path = folder / f"{cells[0].study}_{kind}.png"
        figures.save(figures.class_rows(lines, names, title), path)


if __name__ == "__main__":
    run_command(main, Paper)
