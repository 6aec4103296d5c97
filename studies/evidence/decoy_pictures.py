"""Draw attribution maps of the models of the Decoy study on test images with a decoy.

python -m studies.evidence.decoy_pictures --out results/right_reasons

Uses the final runs of `studies.evidence.right_reasons` with seed 0. A run's saved model is loaded;
if it is missing, the model is trained again with the same configuration. The maps are integrated
gradients, which no training loss used.
"""

from dataclasses import replace

import torch

from batchcam import figures
from batchcam.data.preprocessing import to_device
from studies.commands import run_command
from studies.evidence.measures import explain
from studies.evidence.right_reasons import RightReasons, choose
from studies.evidence.runs import Run, state_of
from studies.evidence.training import load_prepared, train


def main(settings: RightReasons) -> None:
    """Draw one figure per data set, with the methods that have a chosen λ and a run with seed 0."""
    torch.set_num_threads(settings.workers.threads)
    for dataset in settings.datasets:
        cells = [(dataset, method) for method in settings.methods]
        chosen = choose(replace(settings, table_only=True), cells).values()
        final = [replace(run, stage="final") for run in chosen]
        completed = [run for run in final if run.path(settings.out).is_file()]
        if completed:
            draw(settings, completed)


def draw(settings: RightReasons, runs: list[Run]) -> None:
    """Draw the first test image of each class and each model's integrated gradients for it."""
    test = load_prepared(runs[0].study).dataset
    _, labels = to_device(test.test, torch.device("cpu"))
    first = [(labels == label).int().argmax() for label in range(test.num_classes)]
    drawn = test.test.take(torch.stack(first).numpy())
    images, _ = to_device(drawn, torch.device("cpu"))
    rows: list[figures.Row] = [("image", images.float().mean(dim=1) / 255, None)]
    for run in runs:
        prepared = load_prepared(run.config.dataset, run.config.prototype)
        result = train(run, prepared, state_of(run, settings.out))
        explained = explain(result.model.cpu(), images, result.preprocess)
        attribution = explained.integrated
        maps = attribution / attribution.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        notes = [
            test.class_names[predicted] + ("" if predicted == label else ", wrong")
            for label, predicted in enumerate(explained.predicted.tolist())
        ]
        rows.append((run.method.replace(", ", "\n").replace(" and ", "\nand "), maps, notes))
    title = f"Integrated gradients of the answer below them: {runs[0].study}, test images, seed 0"
    figure = figures.class_rows(rows, test.class_names, title)
    figures.save(figure, settings.out / f"{runs[0].study}.png")


if __name__ == "__main__":
    run_command(main, RightReasons)
