"""Tests of the checks that a CAM can explain a backbone at an output stride and a resolution."""

import copy

import pytest
import torch
from torch import Tensor, nn

from batchcam.errors import BackboneError
from batchcam.models import (
    ExplainableModel,
    check_explainable,
    create_model,
    feature_grid,
    resolve_output_stride,
)


@pytest.mark.parametrize(
    ("name", "resolution", "stride", "grid"),
    [
        ("simple_cnn", 28, None, (14, 14)),
        ("resnet18", 28, 8, (4, 4)),
        ("convnextv2_tiny", 28, 8, (3, 3)),
        ("resnet18", 112, None, (4, 4)),
        ("resnet18", 48, 16, (3, 3)),
    ],
)
def test_a_stride_left_out_is_the_first_whose_grid_is_three_cells(
    name: str, resolution: int, stride: int | None, grid: tuple[int, int]
) -> None:
    assert resolve_output_stride(name, resolution) == stride
    assert feature_grid(name, resolution, 1, stride) == grid


def test_a_stride_that_is_given_is_kept() -> None:
    assert resolve_output_stride("resnet18", 112, output_stride=8) == 8
    assert resolve_output_stride("resnet18", 48, output_stride=32) == 32
    assert feature_grid("resnet18", 112, 1, 8) == (14, 14)


def test_the_grid_is_told_without_touching_the_random_state() -> None:
    before = torch.get_rng_state()
    feature_grid("resnet10t", 40, 1, 8)
    check_explainable(create_model("simple_cnn"), 28, 1)
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.manual_seed(0)
    feature_grid("resnet10t", 44, 1, 8)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_transformer_is_refused_at_its_own_resolution_for_a_cnn(name: str) -> None:
    with pytest.raises(BackboneError, match=rf"{name} gives features.*convolutional backbone"):
        resolve_output_stride(name, 224, in_chans=3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_transformer_is_refused_at_another_resolution(name: str) -> None:
    with pytest.raises(BackboneError, match=rf"{name} fails on 28x28 pixels.*doesn't match"):
        resolve_output_stride(name, 28)


def test_a_backbone_that_shrinks_images_away_asks_for_a_larger_resolution() -> None:
    with pytest.raises(BackboneError, match=r"densenet121 fails on 28x28.*larger resolution"):
        resolve_output_stride("densenet121", 28)


@pytest.mark.parametrize(("name", "stride"), [("resnet18", 32), ("ghostnet_100", None)])
def test_a_grid_of_one_cell_is_refused(name: str, stride: int | None) -> None:
    with pytest.raises(BackboneError, match=f"{name} reduces 28x28.*1x1.*smaller output_stride"):
        resolve_output_stride(name, 28, output_stride=stride)


class _MixingHead(ExplainableModel):
    """A model with batch normalisation in its head, which mixes the images of a training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.classifier = nn.Linear(4, 3)

    def features(self, images: Tensor) -> Tensor:
        maps: Tensor = self.convolution(images)
        return maps

    def head(self, features_NKHW: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.norm(features_NKHW.mean(dim=(2, 3))))
        return logits


def test_a_head_that_mixes_images_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"_MixingHead mixes the images.*such as resnet18"):
        check_explainable(_MixingHead(), 28, in_chans=1)


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_the_model_as_it_was(training: bool) -> None:
    model = create_model("simple_cnn").train(training)
    before = copy.deepcopy(model.state_dict())
    check_explainable(model, 28, in_chans=1)
    assert model.training is training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
