"""Check that the Decoy study's figure shows the finished final runs, without training again."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from batchcam.training.fit import Trainer
from studies.evidence import decoy_pictures, right_reasons
from studies.evidence.right_reasons import RightReasons
from studies.evidence.workers import Workers


@pytest.mark.usefixtures("on_digits")
def test_a_figure_shows_the_final_runs_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RightReasons(
        out=tmp_path,
        datasets=("mnist",),
        methods=("cross-entropy", "RRR, given the masks"),
        seeds=1,
        epochs=1,
        precision="fp32",
        workers=Workers(threads=1),
    )
    decoy_pictures.main(settings)
    assert not list(tmp_path.rglob("*.png"))
    right_reasons.main(replace(settings, methods=("cross-entropy",)))

    def no_training(*_: object) -> None:
        raise AssertionError("a saved model was trained again")

    monkeypatch.setattr(Trainer, "run_epoch", no_training)
    decoy_pictures.main(settings)
    (drawn,) = tmp_path.rglob("*.png")
    assert drawn.name == "decoy_mnist.png"
    with Image.open(drawn) as picture:  # Two rows of ten: images, one model's attribution.
        assert picture.width > 3 * picture.height
