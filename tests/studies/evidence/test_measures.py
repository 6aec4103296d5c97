"""Check measures of explanations on models and maps whose values are known by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchcam.data.preprocessing import Preprocess
from batchcam.models import ExplainableModel, create_model
from studies.evidence import measures

PLAIN = Preprocess(8, (0.0,), (1.0,))


class _Corners(ExplainableModel):
    """A model whose features are the image; class 0 scores its left half, class 1 its right."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2, bias=False)
        halves = torch.zeros(2, 8, 8)
        halves[0, :, :4] = halves[1, :, 4:] = 1
        with torch.no_grad():
            self.linear.weight.copy_(halves.flatten(1))

    def features(self, images: Tensor) -> Tensor:
        return images

    def head(self, features_NKHW: Tensor) -> Tensor:
        return self.linear(features_NKHW.flatten(1))  # type: ignore[no-any-return]


def _images() -> Tensor:
    """Return three images: bright on the left, bright on the right, dark."""
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    images[0, 0, 2, 1], images[0, 0, 2, 6] = 30, 10
    images[1, 0, 5, 5] = 7
    return images


def test_explanations_of_a_linear_model_are_its_terms() -> None:
    found = measures.explain(_Corners().eval(), _images(), PLAIN, batch_size=2)
    assert found.predicted.tolist() == [0, 1, 0]
    terms = torch.zeros(3, 8, 8)
    terms[0, 2, 1], terms[1, 5, 5] = 30 / 255, 7 / 255
    torch.testing.assert_close(found.evidence, terms)
    # The path is a straight line from 0, which is the data's mean grey after normalisation.
    torch.testing.assert_close(found.integrated, terms, atol=1e-6, rtol=1e-5)
    # Grad-CAM averages the gradient, to 0.5 here, and so shows the other half of the image too.
    torch.testing.assert_close(found.cams, 0.5 * _images()[:, 0] / 255)


def test_mass_share_is_the_part_under_the_mask_and_concentration_that_by_its_area() -> None:
    mass = torch.zeros(3, 4, 4)
    mass[0, 0, 0], mass[0, 3, 3] = 30, 10
    mass[1, 1, 1] = 7
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)  # Four pixels per cell.
    masks[:, :4, :4] = True
    shares = measures.mass_share(mass, masks)
    assert shares[:2].tolist() == [0.75, 1.0]
    assert math.isnan(shares[2])
    assert measures.concentration(mass, masks)[:2].tolist() == [3.0, 4.0]
    everywhere = measures.concentration(torch.ones(3, 4, 4), masks)
    assert everywhere.tolist() == [1.0, 1.0, 1.0]


def test_a_map_that_is_its_prototype_is_nearer_to_it_than_to_others() -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(3, 12, 12, generator=generator)
    prototypes /= prototypes.amax(dim=(1, 2), keepdim=True)
    cams = torch.cat([prototypes[[2]], torch.zeros(1, 12, 12)])
    gap = measures.prototype_gap(cams, torch.tensor([2, 0]), prototypes)
    assert gap[0] > 0.8
    assert math.isnan(gap[1])
    same = measures.prototype_gap(cams[:1], torch.tensor([1]), prototypes[:1].expand(3, -1, -1))
    assert same[0].abs() < 1e-6


def test_a_template_has_no_diversity() -> None:
    generator = torch.Generator().manual_seed(0)
    template = torch.rand(1, 12, 12, generator=generator).expand(6, -1, -1)
    classes = torch.tensor([0, 0, 0, 1, 1, 1])
    assert measures.diversity(template, classes, 12) == pytest.approx(0, abs=1e-6)
    noise = torch.rand(6, 12, 12, generator=generator)
    assert measures.diversity(noise, classes, 12) > 0.5
    assert math.isnan(measures.diversity(torch.zeros(2, 12, 12), classes[:2], 12))


def test_road_rewards_maps_of_what_the_model_uses() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 40, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[:, 0, 1:3, 1:3] = 255
    model = _Corners().eval()
    predicted = torch.zeros(12, dtype=torch.int64)
    true = torch.zeros(12, 8, 8)
    true[:, 1:3, 1:3] = 1
    state = torch.get_rng_state()
    scores = measures.road(model, images, PLAIN, true, predicted)
    assert torch.equal(torch.get_rng_state(), state)
    wrong = measures.road(model, images, PLAIN, true.flip(2), predicted)
    assert scores.mean() > 0.02
    assert scores.mean() > wrong.mean() + 0.02
    nil = torch.cat([true[:3], torch.zeros(9, 8, 8)])
    assert len(measures.road(model, images, PLAIN, nil, predicted)) == 3


def test_randomisation_compares_with_the_same_model_of_other_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, fresh = (create_model("simple_cnn").eval() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 1, 28, 28), generator=generator, dtype=torch.uint8)
    preprocess = Preprocess(28, (0.5,), (0.5,))
    found = measures.explain(model, images, preprocess)
    kept = {name: value.clone() for name, value in model.state_dict().items()}

    def alike(other: ExplainableModel) -> measures.Randomised:
        return measures.randomisation(model, other, images, preprocess, found.cams, found.predicted)

    same = alike(model)
    assert same.head == pytest.approx(1, abs=1e-5)
    assert same.everything == pytest.approx(1, abs=1e-5)
    other = alike(fresh)
    assert other.head < 0.95
    assert other.everything < 0.95
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_grid_weights_are_the_share_of_a_cell_that_is_masked() -> None:
    mass = torch.ones(1, 2, 2)
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0, 0] = True
    share = measures.mass_share(mass, masks)
    assert share.item() == pytest.approx(F.avg_pool2d(masks.float(), 2).mean().item())
