"""Tests of the creation of models by name, and of the errors for invalid names and options."""

from pathlib import Path

import pytest
import torch

from batchcam.errors import BackboneError
from batchcam.models import backbone_names, create_model, feature_grid


def test_colour_images_are_taken() -> None:
    model = create_model("simple_cnn", num_classes=3, in_chans=3).eval()
    assert model(torch.rand(2, 3, 28, 28)).shape == (2, 3)
    assert feature_grid("resnet10t", 28, 3, 8) == (4, 4)


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet81", "resnet18"), ("simplecnn", "simple_cnn"), ("convnext2_tiny", "convnextv2_tiny")],
)
def test_an_unknown_name_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(BackboneError, match=f"'{name}' is unknown. Did you mean .*{near}"):
        create_model(name)
    assert near in backbone_names()


def test_simple_cnn_has_one_stride_and_no_pretrained_weights() -> None:
    with pytest.raises(BackboneError, match="output stride of 2, not 8; leave output_stride out"):
        create_model("simple_cnn", output_stride=8)
    with pytest.raises(BackboneError, match="no pretrained weights; set pretrained to false"):
        create_model("simple_cnn", pretrained=True)
    assert create_model("simple_cnn", output_stride=2)


def test_a_stride_on_a_backbone_without_one_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"densenet121 cannot have output_stride=8.*leave"):
        create_model("densenet121", output_stride=8)


def test_a_tag_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"resnet18\.no_such_tag cannot be built.*another"):
        create_model("resnet18.no_such_tag")


def test_pretrained_weights_out_of_reach_name_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    # Same effect as HF_HUB_OFFLINE=1 and an empty HF_HOME, set before the import.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match=r"resnet18 cannot be loaded.*HF_HOME.*pretrained to"):
        create_model("resnet18", pretrained=True)
