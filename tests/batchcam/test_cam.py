"""Tests of CAMs: exact values, a literal implementation of Eqs. 4-6, and invariances."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchcam.cam import (
    attribution,
    batch_cam,
    class_maps,
    fused_weighted_sum,
    grad_cam,
    of_targets,
    pooled,
    render,
    score_gradients,
    weighted_maps,
    weighted_sums,
)

seeds = st.integers(0, 2**16)


def _flat_head(features: Tensor, weight: Tensor) -> Tensor:
    return features.flatten(1) @ weight.T


def _smooth_head(features: Tensor, weight: Tensor) -> Tensor:
    """Return logits of a head whose gradient depends on its input, as a ConvNeXt's does."""
    return features.flatten(1).tanh() @ weight.T


def _random_batch(
    seed: int, images: int = 6, classes: int = 4, channels: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 features `(N, K, 3, 2)`, labels and the weight of a head."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, channels, 3, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (images,), generator=generator)
    weight = torch.randn(classes, channels * 6, generator=generator, dtype=torch.float64)
    return features.requires_grad_(), labels, weight.requires_grad_()


def _literal_batch_cam(
    logits: Tensor, features: Tensor, labels: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Compute Eqs. 4-6 literally, from the mean features and mean gradients of each class."""
    maps = torch.zeros(classes, *features.shape[2:], dtype=features.dtype)
    present = torch.zeros(classes, dtype=torch.bool)
    for label in range(classes):
        members = [i for i in range(len(labels)) if labels[i] == label]
        if not members:
            continue
        gradients = [
            torch.autograd.grad(logits[i, label], features, retain_graph=True)[0][i]
            for i in members
        ]
        mean_features = torch.stack([features[i] for i in members]).mean(dim=0)  # Eq. 4
        mean_gradients = torch.stack(gradients).mean(dim=0)  # Eq. 5
        alpha = mean_gradients.mean(dim=(1, 2))  # Eq. 6
        maps[label] = (alpha[:, None, None] * mean_features).sum(dim=0).clamp(min=0)
        present[label] = True
    return maps, present


def test_grad_cam_of_a_linear_head_is_what_pencil_and_paper_give() -> None:
    # Two channels on a 2x2 grid, two classes. The head is linear, so dS_c/dA_k is its weight.
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 5.0]]]])
    weight = torch.tensor(
        [
            [1.0, 1.0, 2.0, 0.0, -1.0, -1.0, 0.0, 0.0],  # Pooled: channel 0: 1, channel 1: -1/2.
            [0.0, 0.0, 0.0, -4.0, 2.0, 2.0, 2.0, 2.0],  # Pooled: channel 0: -1, channel 1: 2.
        ]
    )
    features.requires_grad_()
    logits = _flat_head(features, weight)
    # Class 0: 1 * A_0 - 1/2 * A_1 = [[1, 1.5], [3, 1.5]]
    expected = torch.tensor([[[1.0, 1.5], [3.0, 1.5]]])
    torch.testing.assert_close(grad_cam(logits, features, torch.tensor([0])), expected)
    # Class 1: -1 * A_0 + 2 * A_1 = [[-1, 0], [-3, 6]]; the ReLU cuts the negative evidence.
    expected = torch.tensor([[[0.0, 0.0], [0.0, 6.0]]])
    torch.testing.assert_close(grad_cam(logits, features, torch.tensor([1])), expected)


def test_batch_cam_averages_a_class_before_the_relu() -> None:
    # One channel gives each class one pooled weight: class 0: 1, class 1: -2, class 2: 3.
    weight = torch.tensor([[1.0] * 4, [-2.0] * 4, [3.0] * 4])
    features = torch.tensor(
        [
            [[[4.0, -6.0], [0.0, 2.0]]],  # class 0
            [[[2.0, 2.0], [-8.0, 2.0]]],  # class 0
            [[[1.0, -1.0], [0.5, 0.0]]],  # class 1
        ]
    ).requires_grad_()
    labels = torch.tensor([0, 0, 1])
    maps, present = batch_cam(_flat_head(features, weight), features, labels, num_classes=3)
    expected = torch.tensor(
        [
            # Mean of the two: [[3, -2], [-4, 2]]. Averaging after a ReLU would give 1 at (0, 1).
            [[3.0, 0.0], [0.0, 2.0]],
            # -2 * [[1, -1], [0.5, 0]] = [[-2, 2], [-1, 0]]
            [[0.0, 2.0], [0.0, 0.0]],
            # Class 2 is absent.
            [[0.0, 0.0], [0.0, 0.0]],
        ]
    )
    torch.testing.assert_close(maps, expected)
    assert present.tolist() == [True, True, False]


def test_batch_cam_averages_gradients_that_differ_between_images() -> None:
    # S = A_1^2 / 2 + 4 A_2 on one channel of 1x2: the gradient is (A_1, 4), pooled (A_1 + 4) / 2.
    features = torch.tensor([[[[2.0, 1.0]]], [[[4.0, -3.0]]]], requires_grad=True)
    flat = features.flatten(1)
    logits = (flat[:, 0] ** 2 / 2 + 4 * flat[:, 1])[:, None]
    maps, _ = batch_cam(logits, features, torch.tensor([0, 0]), num_classes=1)
    # Pooled gradients 3 and 4, mean 3.5; mean features (3, -1). The mean of the images' CAMs
    # differs: ((6 + 16) / 2, ...) = (11, ...).
    torch.testing.assert_close(maps, torch.tensor([[[10.5, 0.0]]]))


@given(seeds)
def test_batch_cam_is_the_literal_reading_of_the_equations(seed: int) -> None:
    features, labels, weight = _random_batch(seed)
    logits = _smooth_head(features, weight)
    maps, present = batch_cam(logits, features, labels, num_classes=4)
    expected_maps, expected_present = _literal_batch_cam(logits, features, labels, 4)
    torch.testing.assert_close(maps, expected_maps)
    assert torch.equal(present, expected_present)


@given(seeds)
def test_batch_cam_of_single_images_is_their_grad_cam(seed: int) -> None:
    features, _, weight = _random_batch(seed, images=4)
    labels = torch.tensor([2, 0, 3, 1])
    logits = _smooth_head(features, weight)
    maps, present = batch_cam(logits, features, labels, num_classes=4)
    torch.testing.assert_close(maps[labels], grad_cam(logits, features, labels))
    assert present.all()


@given(seeds)
def test_a_batch_of_one_has_one_map(seed: int) -> None:
    features, labels, weight = _random_batch(seed, images=1)
    logits = _smooth_head(features, weight)
    maps, present = batch_cam(logits, features, labels, num_classes=4)
    assert present.nonzero().flatten().tolist() == labels.tolist()
    torch.testing.assert_close(maps[labels], grad_cam(logits, features, labels))
    assert maps[~present].count_nonzero() == 0


@given(seeds)
def test_permuting_a_batch_permutes_grad_cam_and_leaves_batch_cam(seed: int) -> None:
    features, labels, weight = _random_batch(seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = features.detach()[order].requires_grad_()
    logits, shuffled_logits = _smooth_head(features, weight), _smooth_head(shuffled, weight)
    torch.testing.assert_close(
        grad_cam(shuffled_logits, shuffled, labels[order]),
        grad_cam(logits, features, labels)[order],
    )
    maps, present = batch_cam(logits, features, labels, num_classes=4)
    shuffled_maps, shuffled_present = batch_cam(shuffled_logits, shuffled, labels[order], 4)
    torch.testing.assert_close(shuffled_maps, maps)
    assert torch.equal(shuffled_present, present)


@given(seeds, st.floats(0.01, 100))
def test_cams_scale_with_the_logits(seed: int, factor: float) -> None:
    features, labels, weight = _random_batch(seed)
    logits = _smooth_head(features, weight)
    torch.testing.assert_close(
        grad_cam(factor * logits, features, labels), factor * grad_cam(logits, features, labels)
    )
    torch.testing.assert_close(
        batch_cam(factor * logits, features, labels, 4)[0],
        factor * batch_cam(logits, features, labels, 4)[0],
    )


@given(seeds)
def test_a_class_constant_added_to_the_logits_changes_no_cam(seed: int) -> None:
    features, labels, weight = _random_batch(seed)
    logits = _smooth_head(features, weight)
    torch.testing.assert_close(
        grad_cam(logits + torch.arange(4), features, labels), grad_cam(logits, features, labels)
    )


@given(seeds)
def test_more_classes_than_the_batch_holds_change_nothing(seed: int) -> None:
    features, labels, weight = _random_batch(seed)
    logits = _smooth_head(features, weight)
    few, _ = batch_cam(logits, features, labels, num_classes=4)
    many, present = batch_cam(logits, features, labels, num_classes=9)
    torch.testing.assert_close(many[:4], few)
    assert many[4:].count_nonzero() == 0
    assert not present[4:].any()


def test_grad_cam_gradients_pass_gradcheck() -> None:
    features, labels, weight = _random_batch(3)

    def maps_of(a: Tensor, w: Tensor) -> Tensor:
        return grad_cam(_smooth_head(a, w), a, labels)

    assert torch.autograd.gradcheck(maps_of, (features, weight))


def test_batch_cam_gradients_pass_gradcheck() -> None:
    features, labels, weight = _random_batch(5)

    def maps_of(a: Tensor, w: Tensor) -> Tensor:
        return batch_cam(_smooth_head(a, w), a, labels, 4)[0]

    assert torch.autograd.gradcheck(maps_of, (features, weight))


def test_no_gradient_is_left_on_any_tensor() -> None:
    features, labels, weight = _random_batch(0)
    logits = _smooth_head(features, weight)
    grad_cam(logits, features, labels)
    batch_cam(logits, features, labels, 4)
    assert features.grad is None
    assert weight.grad is None


def test_without_create_graph_maps_know_nothing_of_the_head() -> None:
    features, labels, weight = _random_batch(0)
    maps = grad_cam(_smooth_head(features, weight), features, labels, create_graph=False)
    (gradient,) = torch.autograd.grad(maps.sum(), weight, allow_unused=True)
    assert gradient is None


def test_half_precision_features_give_float32_maps() -> None:
    features, labels, weight = _random_batch(0)
    low, low_weight = (t.detach().bfloat16().requires_grad_() for t in (features, weight))
    maps = grad_cam(_flat_head(low, low_weight), low, labels)
    assert maps.dtype == torch.float32
    expected = grad_cam(_flat_head(features, weight), features, labels).float()
    torch.testing.assert_close(maps, expected, atol=0.05, rtol=0.05)


def test_a_surrounding_autocast_does_not_coarsen_the_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(4, 5, 3, 3, generator=generator)
    weights = torch.randn(4, 5, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = weighted_maps(weights, features)
    assert torch.equal(inside, weighted_maps(weights, features))


def test_a_cam_can_be_had_where_gradients_are_off() -> None:
    features, labels, weight = _random_batch(0)
    logits = _smooth_head(features, weight)
    expected = grad_cam(logits, features, labels)
    with torch.no_grad():
        maps = grad_cam(logits, features, labels, create_graph=False)
    torch.testing.assert_close(maps, expected)
    assert not maps.requires_grad


@pytest.mark.parametrize("images", [1, 7, 64])
def test_class_maps_average_weights_and_features_separately(images: int) -> None:
    generator = torch.Generator().manual_seed(images)
    features = torch.rand(images, 5, 4, 4, generator=generator)
    weights = torch.randn(images, 5, generator=generator)
    maps, _ = class_maps(weights, features, torch.zeros(images, dtype=torch.int64), num_classes=1)
    expected = weighted_maps(weights.mean(dim=0, keepdim=True), features.mean(dim=0, keepdim=True))
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weighted_sums_are_the_same_in_any_layout_and_precision(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 8, 3, 2, generator=generator).to(dtype, memory_format=layout)
    features.requires_grad_()
    weights = torch.randn(5, 8, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(5, 3, 2, generator=generator).to(dtype)
    precise = [each.detach().double().requires_grad_() for each in (weights, features)]
    expected = (precise[0][:, :, None, None] * precise[1]).sum(dim=1)
    wanted = torch.autograd.grad(expected, precise, upstream.double())

    found = weighted_sums(weights, features)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    close = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
    gradients = torch.autograd.grad(found, (weights, features), upstream.to(found.dtype))
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=close, atol=close)
    # A gradient in another layout would slow down the rest of the backward pass.
    assert gradients[1].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("head", ["flattens", "averages"])
def test_fused_weighted_sum_adds_its_gradient_to_that_of_the_head(
    head: str, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 8, 3, 2, generator=generator).to(dtype, memory_format=layout)
    features.requires_grad_()
    weights = torch.randn(5, 8, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(5, 8, 3, 2, generator=generator).to(dtype)

    def onward(features: Tensor) -> Tensor:
        return (features * upstream).sum() if head == "flattens" else features.mean()

    same, sums = fused_weighted_sum(weights, features)
    assert torch.equal(same, features)
    found = torch.autograd.grad(onward(same) + sums.square().sum(), (weights, features))
    apart = onward(features) + weighted_sums(weights, features).square().sum()
    wanted = torch.autograd.grad(apart, (weights, features))
    close = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)
    assert found[1].is_contiguous(memory_format=layout)


def test_fused_weighted_sum_passes_gradcheck_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    prepared = (weights.requires_grad_(), features.requires_grad_())
    assert torch.autograd.gradcheck(fused_weighted_sum, prepared)
    assert torch.autograd.gradgradcheck(fused_weighted_sum, prepared)
    assert torch.autograd.gradcheck(lambda w, f: fused_weighted_sum(w, f)[0], prepared)
    assert torch.autograd.gradcheck(weighted_sums, prepared)


@pytest.mark.parametrize("cells", [(1, 1), (3, 2)], ids=["same in all cells", "cell by cell"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attribution_by_known_gradients_is_the_same_in_any_layout(
    cells: tuple[int, int], layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 8, 3, 2, generator=generator).to(memory_format=layout)
    features.requires_grad_()
    known = torch.randn(4, 8, *cells, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 1, 1, 0, 3])
    expected = (known[targets] * features).sum(dim=1)
    wanted = torch.autograd.grad(expected.square().sum(), (features, known))
    found = attribution(of_targets(known, targets, features), features)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.square().sum(), (features, known))
    torch.testing.assert_close(gradients, wanted)
    assert gradients[0].is_contiguous(memory_format=layout)


def test_attribution_of_a_linear_head_sums_to_the_score() -> None:
    """Check the faithfulness of Draelos and Carin, which pooled gradients do not have."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(3, 2, 4, 4, generator=generator, requires_grad=True)
    weight = torch.randn(5, 2, 4, 4, generator=generator)
    logits, targets = torch.einsum("nkhw,ckhw->nc", features, weight), torch.tensor([4, 0, 2])
    gradients = score_gradients(logits, features, targets, create_graph=False)
    scores = logits.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(attribution(gradients, features).sum(dim=(1, 2)), scores)
    pooled_sums = weighted_sums(pooled(gradients), features).sum(dim=(1, 2))
    assert not torch.allclose(pooled_sums, scores, rtol=0.1)


def test_sums_of_bfloat16_features_are_rounded_once_and_have_no_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(6, 64, 5, 5, generator=generator).bfloat16()
    weights = torch.randn(4, 64, generator=generator).bfloat16().float()
    targets = torch.arange(6) % 4
    found = weighted_sums(weights[targets], features)
    assert found.dtype == torch.float32
    exact = torch.einsum("nk,nkhw->nhw", weights[targets].double(), features.double())
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)


def test_misshapen_inputs_are_refused_with_their_shapes() -> None:
    features, labels, weight = _random_batch(0)
    logits = _flat_head(features, weight)
    with pytest.raises(ValueError, match=r"features \(N, K, H, W\).*\(6, 18\)"):
        grad_cam(logits, features.flatten(1), labels)
    with pytest.raises(ValueError, match=r"targets \(N,\).*\(6, 1\)"):
        grad_cam(logits, features, labels[:, None])
    with pytest.raises(ValueError, match="one N, got 6 logits, 6 features and 5 targets"):
        batch_cam(logits, features, labels[:5], 4)


def test_render_upsamples_and_scales_the_maximum_to_one() -> None:
    # Bilinear, align_corners=False: 2 -> 4 cells lie 1/4 and 3/4 of the way between neighbours.
    maps = torch.tensor([[[0.0, 4.0], [0.0, 4.0]]])
    row = torch.tensor([0.0, 1.0, 3.0, 4.0]) / (4 + 1e-6)
    torch.testing.assert_close(render(maps, 4), row.expand(1, 4, 4))


@pytest.mark.parametrize(("rows", "columns", "pixels"), [(3, 3, 28), (14, 7, 28), (9, 9, 4)])
def test_render_upsamples_as_interpolate_does(rows: int, columns: int, pixels: int) -> None:
    maps = torch.rand(3, rows, columns, generator=torch.Generator().manual_seed(0)).double()
    expected = F.interpolate(maps[:, None], (pixels, pixels), mode="bilinear").squeeze(1)
    expected /= expected.amax(dim=(1, 2), keepdim=True) + 1e-6
    torch.testing.assert_close(render(maps, pixels), expected)


def test_render_scales_each_map_by_itself() -> None:
    maps = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    together = render(maps * torch.tensor([1.0, 10.0, 100.0])[:, None, None], 14)
    torch.testing.assert_close(together.amax(dim=(1, 2)), torch.ones(3), atol=1e-5, rtol=0)


def test_an_empty_map_stays_empty() -> None:
    assert render(torch.zeros(2, 3, 3), 28).count_nonzero() == 0


@given(seeds, st.floats(0.1, 1e4))
def test_render_does_not_see_a_positive_factor(seed: int, factor: float) -> None:
    maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(seed))
    # Loose, because the 1e-6 in the denominator has more effect where the maximum is small.
    torch.testing.assert_close(render(factor * maps, 14), render(maps, 14), atol=1e-4, rtol=0)
