"""Check that the figures show the finished final runs, without training again."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from batchcam.training.fit import Trainer
from studies.evidence import paper, pictures
from studies.evidence.paper import BASELINE, Paper
from studies.evidence.workers import Workers


@pytest.mark.usefixtures("on_digits")
def test_figures_show_the_final_runs_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Paper(
        out=tmp_path,
        datasets=("mnist",),
        conditions=(BASELINE, "BCPL, L1"),
        seeds=1,
        epochs=1,
        selection_epochs=1,
        workers=Workers(threads=1),
    )
    pictures.main(settings)
    assert not list(tmp_path.rglob("*.png"))
    paper.main(replace(settings, conditions=(BASELINE,)))

    def no_training(*_: object) -> None:
        raise AssertionError("a saved model was trained again")

    monkeypatch.setattr(Trainer, "run_epoch", no_training)
    pictures.main(settings)
    drawn = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert drawn == ["mnist_simple_cnn_errors.png", "mnist_simple_cnn_prototypes.png"]
    with Image.open(tmp_path / "figures" / drawn[0]) as picture:
        assert picture.width > 3 * picture.height
