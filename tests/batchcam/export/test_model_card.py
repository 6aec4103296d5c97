"""Tests of the names of runs in a model card."""

import pytest

from batchcam.config import TrialConfig
from batchcam.export.model_card import title


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ({}, "cross-entropy"),
        ({"proto": 0.5}, "Prototype Loss 0.5 (SSIM)"),
        ({"proto": 0.5, "batch": 2.0}, "Prototype Loss 0.5 (SSIM) + BCPL 2 (SSIM)"),
        ({"energy": 10.0}, "prototype energy 10"),
        ({"batch": 0.1, "energy": 10.0}, "BCPL 0.1 (SSIM) + prototype energy 10"),
        ({"energy": 10.0, "exchange": 0.3}, "prototype energy 10 + prototype exchange 0.3"),
    ],
)
def test_a_title_names_the_loss(weights: dict[str, float], name: str) -> None:
    lambdas = {f"lambda_{term}": weight for term, weight in ({"batch": 0.0} | weights).items()}
    config = TrialConfig.from_dict({"metric": "ssim", **lambdas})
    assert title(config) == f"simple_cnn on digits, {name}"
