"""What a bundle says of itself: the names of its run."""

import pytest

from batchcam.card import title
from batchcam.config import TrialConfig


@pytest.mark.parametrize(
    ("proto", "batch", "name"),
    [
        (0.0, 0.0, "simple_cnn on digits, cross-entropy"),
        (0.5, 0.0, "simple_cnn on digits, Prototype Loss 0.5 (SSIM)"),
        (0.5, 2.0, "simple_cnn on digits, Prototype Loss 0.5 + BCPL 2 (SSIM)"),
    ],
)
def test_a_title_names_the_loss(proto: float, batch: float, name: str) -> None:
    assert title(TrialConfig(lambda_proto=proto, lambda_batch=batch, metric="ssim")) == name
