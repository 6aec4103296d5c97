"""Tests of PreparedData: prototypes of each split, prototype indices, off-support masks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.data.preprocessing import to_device
from batchcam.errors import DataError
from batchcam.prototypes import class_supports, min_max


@pytest.fixture(scope="module")
def clustered() -> PreparedData:
    return prepare(TrialConfig(dataset="digits", prototype="kmeans", clusters=3))


def test_each_split_is_compared_with_the_prototypes_meant_for_it(
    tiny_prepared: PreparedData,
) -> None:
    train, validation, test = (
        tiny_prepared.prototypes(split, 14) for split in ("train", "validation", "test")
    )
    assert torch.equal(test, train)
    assert not torch.equal(validation, train)
    assert train.shape == (10, 14, 14)


def test_with_one_prototype_per_class_groups_are_classes(tiny_prepared: PreparedData) -> None:
    assert torch.equal(
        tiny_prepared.prototype_index("test"), torch.from_numpy(tiny_prepared.dataset.test.labels)
    )
    assert tiny_prepared.prototype_names == tiny_prepared.dataset.class_names


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_groups_are_within_classes(clustered: PreparedData, split: str) -> None:
    groups = clustered.prototype_index(split)
    labels = torch.from_numpy(clustered.dataset.split(split).labels)
    assert torch.equal(groups // 3, labels)
    assert set(groups.tolist()) == set(range(30))


def test_a_training_prototype_is_the_mean_of_its_group(clustered: PreparedData) -> None:
    images, _ = to_device(clustered.dataset.train, torch.device("cpu"))
    mean = images[clustered.prototype_index("train") == 4, 0].float().mean(dim=0, keepdim=True)
    torch.testing.assert_close(clustered.train_prototypes[4:5], min_max(mean))
    assert clustered.validation_prototypes.shape == clustered.train_prototypes.shape
    assert not torch.equal(clustered.validation_prototypes[4], clustered.train_prototypes[4])


def test_groups_are_named_by_class_and_number(clustered: PreparedData) -> None:
    assert clustered.prototype_names[:4] == ("0 #1", "0 #2", "0 #3", "1 #1")
    assert len(clustered.prototype_names) == len(clustered.train_prototypes) == 30


def test_one_cluster_is_the_mean() -> None:
    one = prepare(TrialConfig(dataset="digits", prototype="kmeans", clusters=1))
    mean = prepare(TrialConfig(dataset="digits"))
    torch.testing.assert_close(one.train_prototypes, mean.train_prototypes)
    assert torch.equal(one.prototype_index("validation"), mean.prototype_index("validation"))


def test_more_clusters_than_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"too few for 999 clusters; set clusters lower"):
        prepare(TrialConfig(dataset="digits", prototype="kmeans", clusters=999))


def test_outside_is_where_a_class_has_no_support(tiny_prepared: PreparedData) -> None:
    outside = tiny_prepared.off_support_mask((8, 8))
    supports = class_supports(*to_device(tiny_prepared.dataset.train, torch.device("cpu")), 10)
    assert torch.equal(outside == 1, ~supports)
    assert outside.dtype == torch.float32
    # A cell of a coarser grid is off support only if all its pixels are.
    coarse = tiny_prepared.off_support_mask((4, 4))
    blocks = outside.view(10, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(coarse == 1, (blocks == 1).all(dim=3))


def test_other_images_keep_prototypes_supports_and_ceilings(tiny_prepared: PreparedData) -> None:
    whole = replace(tiny_prepared)
    whole.compute_ahead([(14, (7, 7))], supports=True)
    # This split lacks most classes, so supports cannot be computed from it.
    part = whole.with_splits(train=whole.dataset.train.take(np.arange(3)))
    assert len(part.dataset.train) == 3
    assert part.dataset.validation is whole.dataset.validation
    assert part.ceiling(14, (7, 7)) is whole.ceiling(14, (7, 7))
    assert torch.equal(part.off_support_mask((7, 7)), whole.off_support_mask((7, 7)))
    assert len(whole.dataset.train) == 200


def test_a_copy_with_other_prototypes_has_ceilings_of_its_own(tiny_prepared: PreparedData) -> None:
    ceiling = tiny_prepared.ceiling(14, (3, 3))
    flat = torch.rand(10, 8, 8, generator=torch.Generator().manual_seed(0))
    other = replace(tiny_prepared, validation_prototypes=flat)
    assert not torch.equal(other.ceiling(14, (3, 3)), ceiling)
