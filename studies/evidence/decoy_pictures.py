"""What models look at in images with a decoy.

python -m studies.evidence.decoy_pictures --out results/right_reasons

Of final runs of `studies.evidence.right_reasons` with seed 0: their kept models, or the same
trained again where these are gone. Shown are integrated gradients, which no loss has seen.
"""

from dataclasses import replace

import torch

from batchcam import figures
from batchcam.data.preprocessing import to_device
from studies.cli import run_command
from studies.evidence.measures import explain
from studies.evidence.right_reasons import RightReasons, choose
from studies.evidence.runs import Run, state_of
from studies.evidence.training import load_prepared, train


def main(settings: RightReasons) -> None:
    """Draw a figure for each data set, of the methods whose λ is chosen and seed 0 is made."""
    torch.set_num_threads(settings.workers.threads)
    for dataset in settings.datasets:
        cells = [(dataset, method) for method in settings.methods]
        chosen = choose(replace(settings, table_only=True), cells).values()
        final = [replace(run, stage="final") for run in chosen]
        made = [run for run in final if run.path(settings.out).is_file()]
        if made:
            draw(settings, made)


def draw(settings: RightReasons, runs: list[Run]) -> None:
    """Draw the first test image of each class, and what each run's model looks at in it."""
    test = load_prepared(runs[0].study).dataset
    _, labels = to_device(test.test, torch.device("cpu"))
    first = [(labels == label).int().argmax() for label in range(test.num_classes)]
    some = test.test.take(torch.stack(first).numpy())
    images, _ = to_device(some, torch.device("cpu"))
    rows: list[figures.Row] = [("image", images.float().mean(dim=1) / 255, None)]
    for run in runs:
        prepared = load_prepared(run.config.dataset, run.config.prototype)
        result = train(run, prepared, state_of(run, settings.out))
        found = explain(result.model.cpu(), images, result.preprocess)
        maps = found.integrated / found.integrated.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        answers = [
            test.class_names[answer] + ("" if answer == label else ", wrong")
            for label, answer in enumerate(found.predicted.tolist())
        ]
        rows.append((run.method.replace(", ", "\n").replace(" and ", "\nand "), maps, answers))
    title = f"Integrated gradients of the answer below them: {runs[0].study}, test images, seed 0"
    figure = figures.class_rows(rows, test.class_names, title)
    figures.save(figure, settings.out / f"{runs[0].study}.png")


if __name__ == "__main__":
    run_command(main, RightReasons)
