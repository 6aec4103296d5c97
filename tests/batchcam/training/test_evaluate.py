"""Tests of the evaluation: class CAMs over many batches, errors, and an unmodified model."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from batchcam.cam import attribution, batch_cam, grad_cam, render, score_gradients
from batchcam.data.prepared import PreparedSplit
from batchcam.data.preprocessing import Preprocess, to_device
from batchcam.models import ExplainableModel
from batchcam.similarity import ssim
from batchcam.training.evaluate import ClassCam, Evaluation, Evaluator
from batchcam.training.fit import TrialResult


def evaluate(
    model: ExplainableModel,
    images: Tensor,
    labels: Tensor,
    prototypes_PRR: Tensor,
    preprocess: Preprocess,
    **options: Any,
) -> Evaluation:
    split = PreparedSplit(images, labels, labels, prototypes_PRR)
    return Evaluator(model, preprocess, **options).evaluate(split)


def error_maps(
    model: ExplainableModel,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    preprocess: Preprocess,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return Evaluator(model, preprocess, **options).error_maps(images, labels, num_classes)


def explain(
    model: ExplainableModel,
    images: Tensor,
    preprocess: Preprocess,
    targets: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return Evaluator(model, preprocess, **options).explain(images, targets)


@pytest.fixture
def model(trained: TrialResult) -> ExplainableModel:
    return copy.deepcopy(trained.model).eval()


@pytest.fixture
def split(trained: TrialResult) -> tuple[Tensor, Tensor]:
    """Return the fifty test images, shuffled so that batches hold several classes."""
    images, labels = to_device(trained.prepared.dataset.test, torch.device("cpu"))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


@pytest.fixture
def prototypes(trained: TrialResult) -> Tensor:
    return trained.prepared.prototypes("test", 14)


def test_class_maps_are_batch_cam_over_the_whole_split(
    trained: TrialResult, model: ExplainableModel, split: tuple[Tensor, Tensor], prototypes: Tensor
) -> None:
    images, labels = split
    found = evaluate(model, images, labels, prototypes, trained.preprocess, batch_size=7)
    features = model.features(trained.preprocess(images))
    maps, _ = batch_cam(model.head(features), features, labels, 10)
    expected = render(maps.detach(), 14)
    torch.testing.assert_close(found.maps_PRR, expected, atol=1e-5, rtol=1e-5)
    expected_ssim = ssim(expected, prototypes)
    torch.testing.assert_close(found.cam_ssim_P, expected_ssim, atol=1e-5, rtol=1e-5)
    assert found.cam_ssim == pytest.approx(expected_ssim.mean().item(), abs=1e-5)


def test_the_sample_level_is_the_mean_over_grad_cams_of_the_true_class(
    trained: TrialResult, model: ExplainableModel, split: tuple[Tensor, Tensor], prototypes: Tensor
) -> None:
    images, labels = split
    found = evaluate(model, images, labels, prototypes, trained.preprocess)
    features = model.features(trained.preprocess(images))
    maps = grad_cam(model.head(features), features, labels).detach()
    expected = ssim(render(maps, 14), prototypes[labels]).mean().item()
    assert found.cam_ssim_sample == pytest.approx(expected, abs=1e-5)


def test_hires_cams_are_the_means_of_what_each_cell_adds(
    trained: TrialResult, model: ExplainableModel, split: tuple[Tensor, Tensor], prototypes: Tensor
) -> None:
    images, labels = split
    found = evaluate(
        model, images, labels, prototypes, trained.preprocess, cam="hires_cam", batch_size=7
    )
    features = model.features(trained.preprocess(images))
    logits = model.head(features)
    maps = attribution(
        score_gradients(logits, features, labels, create_graph=False), features
    ).detach()
    means = torch.stack([maps[labels == label].mean(dim=0) for label in range(10)])
    torch.testing.assert_close(found.maps_PRR, render(means.relu(), 14), atol=1e-5, rtol=1e-5)
    single = render(maps.relu(), 14)
    assert found.cam_ssim_sample == pytest.approx(
        ssim(single, prototypes[labels]).mean().item(), abs=1e-5
    )
    _, explained = explain(model, images, trained.preprocess, labels, cam="hires_cam")
    torch.testing.assert_close(explained, single, atol=1e-5, rtol=1e-5)
    pooled = evaluate(model, images, labels, prototypes, trained.preprocess)
    assert not torch.allclose(found.maps_PRR, pooled.maps_PRR, atol=0.05)

    wrong = logits.argmax(dim=1) != labels
    taken = score_gradients(
        model.head(features), features, logits.argmax(dim=1), create_graph=False
    )
    misled, present = error_maps(model, images, labels, 10, trained.preprocess, cam="hires_cam")
    assert present.equal(labels[wrong].bincount(minlength=10) > 0)
    erring = int(labels[wrong][0])
    mean = attribution(taken, features).detach()[wrong & (labels == erring)].mean(dim=0)
    torch.testing.assert_close(
        misled[erring], render(mean.relu()[None], 14)[0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("cam", ["grad_cam", "hires_cam"])
def test_weights_read_off_a_linear_head_give_what_gradients_give(
    trained: TrialResult,
    model: ExplainableModel,
    split: tuple[Tensor, Tensor],
    prototypes: Tensor,
    cam: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = evaluate(model, *split, prototypes, trained.preprocess, cam=cam, batch_size=7)
    explained = explain(model, split[0], trained.preprocess, cam=cam)
    monkeypatch.setattr(model, "class_weights", lambda _: None)
    monkeypatch.setattr(model, "class_gradients", lambda *_: None)
    found = evaluate(model, *split, prototypes, trained.preprocess, cam=cam, batch_size=7)
    assert found.accuracy == known.accuracy
    torch.testing.assert_close(found.maps_PRR, known.maps_PRR, atol=1e-5, rtol=1e-5)
    assert found.cam_ssim_sample == pytest.approx(known.cam_ssim_sample, abs=1e-5)
    again = explain(model, split[0], trained.preprocess, cam=cam)
    torch.testing.assert_close(again, explained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 49, 50])
def test_the_batch_size_does_not_change_the_result(
    trained: TrialResult,
    model: ExplainableModel,
    split: tuple[Tensor, Tensor],
    prototypes: Tensor,
    batch_size: int,
) -> None:
    whole = evaluate(model, *split, prototypes, trained.preprocess)
    parts = evaluate(model, *split, prototypes, trained.preprocess, batch_size=batch_size)
    assert parts.accuracy == whole.accuracy
    assert torch.equal(parts.confusion_CC, whole.confusion_CC)
    torch.testing.assert_close(parts.maps_PRR, whole.maps_PRR, atol=1e-5, rtol=1e-5)
    assert parts.cam_ssim_sample == pytest.approx(whole.cam_ssim_sample, abs=1e-5)


class _ByBrightness(ExplainableModel):
    """Predicts class 0 for a dark image and class 2 for a bright one, never class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]))

    def features(self, images: Tensor) -> Tensor:
        return images

    def head(self, features_NKHW: Tensor) -> Tensor:
        logits: Tensor = features_NKHW.mean(dim=(1, 2, 3))[:, None] * self.weight
        # The constant keeps class 1 from winning, and has no gradient.
        return logits - torch.tensor([0.0, 9.0, 0.0])


@pytest.fixture
def by_brightness() -> dict[str, Any]:
    """Return arguments of an evaluation with a known outcome.

    The images are dark, bright, bright, dark, bright, bright.
    """
    images = torch.tensor([0, 255, 255, 0, 255, 255], dtype=torch.uint8)[:, None, None, None]
    return {
        "model": _ByBrightness(),
        "images": images.repeat(1, 1, 8, 8),
        "labels": torch.tensor([0, 2, 0, 2, 2, 0]),
        "preprocess": Preprocess(8, (0.5,), (0.5,)),
    }


def test_confusion_counts_true_by_predicted_classes(by_brightness: dict[str, Any]) -> None:
    found = evaluate(**by_brightness, prototypes_PRR=torch.rand(3, 8, 8))
    assert found.confusion_CC.tolist() == [[1, 0, 2], [0, 0, 0], [1, 0, 2]]
    assert found.accuracy == 3 / 6


def test_a_class_without_images_is_nan_and_left_out_of_the_mean(
    by_brightness: dict[str, Any],
) -> None:
    found = evaluate(**by_brightness, prototypes_PRR=torch.rand(3, 8, 8))
    assert found.cam_ssim_P.isnan().tolist() == [False, True, False]
    assert found.cam_ssim == pytest.approx(found.cam_ssim_P[[0, 2]].mean().item())
    assert found.maps_PRR[1].count_nonzero() == 0


@pytest.mark.parametrize("batch_size", [1, 2, 512])
def test_error_maps_explain_what_the_wrong_answers_rest_on(
    by_brightness: dict[str, Any], batch_size: int
) -> None:
    # Images 2 and 5, of class 0, are bright and classified as 2: pixels of 1, a positive weight.
    # Image 3, of class 2, is dark and classified as 0: pixels of -1, a negative weight.
    # Class 1 has no images.
    maps, present = error_maps(**by_brightness, num_classes=3, batch_size=batch_size)
    assert present.tolist() == [True, False, True]
    expected = torch.stack([torch.ones(8, 8), torch.zeros(8, 8), torch.ones(8, 8)])
    torch.testing.assert_close(maps, expected, atol=1e-3, rtol=0)


def test_without_errors_no_class_has_an_error_map(by_brightness: dict[str, Any]) -> None:
    by_brightness["labels"] = torch.tensor([0, 2, 2, 0, 2, 2])
    maps, present = error_maps(**by_brightness, num_classes=3)
    assert not present.any()
    assert maps.count_nonzero() == 0


def test_class_cams_without_any_batch_are_empty() -> None:
    maps, present = ClassCam(4).maps()
    assert maps.shape == (4, 1, 1)
    assert maps.count_nonzero() == 0
    assert not present.any()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(
    trained: TrialResult,
    model: ExplainableModel,
    split: tuple[Tensor, Tensor],
    prototypes: Tensor,
    training: bool,
) -> None:
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    evaluate(model, *split, prototypes, trained.preprocess)
    error_maps(model, *split, 10, trained.preprocess)
    explain(model, split[0], trained.preprocess)
    assert model.training is training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_is_that_of_eval_mode_whatever_mode_the_model_is_in(
    trained: TrialResult, model: ExplainableModel, split: tuple[Tensor, Tensor], prototypes: Tensor
) -> None:
    expected = evaluate(model, *split, prototypes, trained.preprocess)
    found = evaluate(model.train(), *split, prototypes, trained.preprocess)
    assert found.cam_ssim == expected.cam_ssim
    assert found.accuracy == expected.accuracy


def test_evaluation_works_where_gradients_are_off(
    trained: TrialResult, model: ExplainableModel, split: tuple[Tensor, Tensor], prototypes: Tensor
) -> None:
    expected = evaluate(model, *split, prototypes, trained.preprocess)
    with torch.no_grad():
        found = evaluate(model, *split, prototypes, trained.preprocess)
    assert found.cam_ssim == expected.cam_ssim


def test_evaluation_in_bf16_is_close_to_that_in_fp32(
    trained: TrialResult, model: ExplainableModel, split: tuple[Tensor, Tensor], prototypes: Tensor
) -> None:
    exact = evaluate(model, *split, prototypes, trained.preprocess)
    low = evaluate(model, *split, prototypes, trained.preprocess, precision="bf16")
    assert low.cam_ssim == pytest.approx(exact.cam_ssim, abs=0.02)
    assert low.cam_ssim != exact.cam_ssim


@pytest.mark.parametrize("batch_size", [3, 512])
def test_explain_gives_probabilities_and_maps_of_the_predicted_classes(
    trained: TrialResult,
    model: ExplainableModel,
    split: tuple[Tensor, Tensor],
    batch_size: int,
) -> None:
    images = split[0][:10]
    probabilities, maps = explain(model, images, trained.preprocess, batch_size=batch_size)
    with torch.no_grad():
        logits = model(trained.preprocess(images))
    torch.testing.assert_close(probabilities, logits.softmax(dim=1))
    _, same = explain(model, images, trained.preprocess, logits.argmax(dim=1))
    torch.testing.assert_close(maps, same)


def test_explain_explains_the_targets_asked_for(
    trained: TrialResult, model: ExplainableModel, split: tuple[Tensor, Tensor]
) -> None:
    images = split[0][:10]
    targets = torch.arange(10)
    _, maps = explain(model, images, trained.preprocess, targets, batch_size=4)
    features = model.features(trained.preprocess(images))
    expected = render(grad_cam(model.head(features), features, targets).detach(), 14)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-5)


def test_preprocessing_decides_the_resolution_of_explanations(
    trained: TrialResult, model: ExplainableModel, split: tuple[Tensor, Tensor]
) -> None:
    larger = replace(trained.preprocess, resolution=20)
    _, maps = explain(model, split[0][:2], larger)
    assert maps.shape == (2, 20, 20)
