"""Check how the growth of the cost is measured and drawn, and that absent classes use no memory."""

import json
from pathlib import Path

import pytest
import torch

from batchcam.cam import fused_weighted_sum
from studies.benchmarks.batches import peak_bytes
from studies.benchmarks.growth import AXES, Growth, main, points
from tests.batchcam.losses.problems import Head, total_loss


def test_one_quantity_is_varied_at_a_time() -> None:
    found = list(points(Growth(out=Path("unused"))))
    usual = {"batch": 128, "classes": 10, "grid": 14}
    for point in found:
        others = {name: getattr(point, name) for name in AXES if name != point.axis}
        assert others == {name: usual[name] for name in others}
    assert [p.value for p in found if p.axis == "classes"] == [10, 30, 100, 300, 1000]


def test_points_and_figure_are_written(tmp_path: Path) -> None:
    main(
        Growth(
            out=tmp_path, batch=(4, 8), classes=(10,), grid=(4,), seconds=0, min_rounds=2, threads=1
        )
    )
    written = json.loads((tmp_path / "growth.json").read_text())
    assert [entry["axis"] for entry in written["points"]] == ["batch", "batch", "classes", "grid"]
    assert all(len(entry["ratio"]) == 3 for entry in written["points"])
    assert written["command"]
    assert written["versions"]["torch"]
    assert (tmp_path / "growth.png").stat().st_size > 1000


@pytest.mark.parametrize("linear", [True, False])
def test_absent_classes_take_no_memory(linear: bool) -> None:
    classes, images, channels, side = 1000, 8, 64, 14
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(images, channels, side, side, generator=generator, requires_grad=True)
    weights = torch.randn(classes, channels, generator=generator, requires_grad=True)
    labels = torch.randint(classes, (images,), generator=generator)
    prototypes = torch.rand(classes, 28, 28, generator=generator)
    fields = {"lambda_class": 1.0, "lambda_proto": 0.1, "lambda_batch": 0.1}

    def step() -> None:
        same, sums, model = features, None, Head()
        if linear:
            same, sums = fused_weighted_sum(weights[labels] / side**2, features)
            model = Head(weights / side**2)
        logits = same.mean(dim=(2, 3)) @ weights.T
        loss, _ = total_loss(
            fields, logits, same, labels, prototypes, model=model, fused_sums_NHW=sums
        )
        torch.autograd.backward(loss)
        features.grad = weights.grad = None

    every_class = 4 * classes * channels * side**2
    assert peak_bytes(step, torch.device("cpu")) < every_class / 10
