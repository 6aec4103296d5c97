"""Tests that timm's config.json equals that of earlier releases."""

from pathlib import Path

import pytest
import torch

from batchcam.data.preprocessing import Preprocess
from batchcam.export.timm_format import write_config
from batchcam.models import TimmCNN, create_model

EXPECTED = Path(__file__).parent / "timm_config.json"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_config_is_that_of_earlier_releases(tmp_path: Path, layout: torch.memory_format) -> None:
    model = create_model("resnet18", num_classes=3, in_chans=1)
    assert isinstance(model, TimmCNN)
    model.to(memory_format=layout)
    write_config(
        model, ("a", "b", "ü"), 1, Preprocess(32, (0.5,), (0.25,)), tmp_path / "config.json"
    )
    assert (tmp_path / "config.json").read_bytes() == EXPECTED.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
