"""What a bundle says of itself: the names of its run."""

import pytest

from batchcam.card import title
from batchcam.config import TrialConfig


@pytest.mark.parametrize(
    ("proto", "batch", "energy", "name"),
    [
        (0.0, 0.0, 0.0, "cross-entropy"),
        (0.5, 0.0, 0.0, "Prototype Loss 0.5 (SSIM)"),
        (0.5, 2.0, 0.0, "Prototype Loss 0.5 (SSIM) + BCPL 2 (SSIM)"),
        (0.0, 0.0, 10.0, "prototype energy 10"),
        (0.0, 0.1, 10.0, "BCPL 0.1 (SSIM) + prototype energy 10"),
    ],
)
def test_a_title_names_the_loss(proto: float, batch: float, energy: float, name: str) -> None:
    config = TrialConfig(
        lambda_proto=proto, lambda_batch=batch, lambda_energy=energy, metric="ssim"
    )
    assert title(config) == f"simple_cnn on digits, {name}"
