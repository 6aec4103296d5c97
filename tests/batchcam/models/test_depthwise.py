import copy

import pytest
import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from batchcam.models.depthwise import DepthwiseConv2d, use_matrix_products


def converted(conv: nn.Conv2d) -> nn.Conv2d:
    other = nn.Sequential(copy.deepcopy(conv))
    use_matrix_products(other)
    (found,) = other
    assert isinstance(found, nn.Conv2d)
    return found


def depthwise(
    channels: int = 5, kernel: int = 7, dilation: int = 1, bias: bool = True
) -> nn.Conv2d:
    conv = nn.Conv2d(
        channels,
        channels,
        kernel,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=channels,
        bias=bias,
    )
    return conv.double()


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 3), (7, 4), (7, 7), (6, 8)])
@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_convolution(
    grid: tuple[int, int], dilation: int, bias: bool
) -> None:
    conv = depthwise(dilation=dilation, bias=bias)
    ours = converted(conv)
    assert type(ours) is DepthwiseConv2d
    x = torch.randn(3, 5, *grid, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected, found = conv(x), ours(y)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    for mine, theirs in zip(ours.parameters(), conv.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize(("grid", "products"), [((3, 4), 0), ((3, 3), 1)])
def test_only_a_grid_with_no_more_cells_than_taps_is_a_matrix_product(
    grid: tuple[int, int], products: int
) -> None:
    ours = converted(depthwise(kernel=3, bias=False))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        ours(torch.randn(1, 5, *grid, dtype=torch.float64))
    names = [event.key for event in recorded.key_averages()]
    assert names.count("aten::bmm") == products
    assert names.count("aten::convolution") == 1 - products


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, stride=2),
        nn.Conv2d(4, 4, 3, padding=0, groups=4),
        nn.Conv2d(4, 4, 3, padding="same", groups=4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2, groups=4),
    ],
)
def test_other_convolutions_are_left_alone(conv: nn.Conv2d) -> None:
    assert type(converted(conv)) is nn.Conv2d


def test_model_computes_what_it_did_under_the_names_it_had() -> None:
    model = timm.create_model(
        "convnextv2_atto", num_classes=3, in_chans=1, output_stride=8
    ).double()
    images = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    expected, names = model(images), list(model.state_dict())
    use_matrix_products(model)
    assert any(type(module) is DepthwiseConv2d for module in model.modules())
    torch.testing.assert_close(model(images), expected)
    assert list(model.state_dict()) == names
    again = copy.deepcopy(model)
    assert any(type(module) is DepthwiseConv2d for module in again.modules())
    torch.testing.assert_close(torch.compile(again, backend="aot_eager")(images), expected)
