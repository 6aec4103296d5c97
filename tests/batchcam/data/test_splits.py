"""Tests of the stratified split: properties that hold for any labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchcam.data.splits import Labels, Split, stratified_split
from batchcam.errors import DataError

# The number of items in each class, at least two.
class_sizes = st.lists(st.integers(2, 40), min_size=1, max_size=6)
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**32 - 1)


def _labels(sizes: list[int], seed: int = 0) -> Labels:
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)
    return np.random.default_rng(seed).permutation(labels)


@given(class_sizes, fractions, seeds)
def test_every_item_is_in_one_part_and_every_class_in_both(
    sizes: list[int], fraction: float, seed: int
) -> None:
    labels = _labels(sizes, seed)
    kept, held = stratified_split(labels, fraction, seed)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert set(labels[kept]) == set(labels[held]) == set(labels)


@given(class_sizes, fractions, seeds)
def test_each_class_gives_its_rounded_share(sizes: list[int], fraction: float, seed: int) -> None:
    labels = _labels(sizes, seed)
    _, held = stratified_split(labels, fraction, seed)
    for label, size in enumerate(sizes):
        share = int((labels[held] == label).sum())
        assert share == min(max(round(fraction * size), 1), size - 1)


@given(class_sizes, fractions, seeds)
def test_indices_are_sorted_and_a_function_of_the_seed(
    sizes: list[int], fraction: float, seed: int
) -> None:
    labels = _labels(sizes, seed)
    first, second = (stratified_split(labels, fraction, seed) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one, other)
        assert (np.diff(one) > 0).all()


def test_another_seed_gives_another_split() -> None:
    labels = _labels([50, 50])
    _, one = stratified_split(labels, 0.5, seed=0)
    _, other = stratified_split(labels, 0.5, seed=1)
    assert not np.array_equal(one, other)


def test_the_global_random_state_is_not_touched() -> None:
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    stratified_split(_labels([9, 9]), 0.3, seed=0)
    assert np.random.random() == expected


def test_a_class_of_one_is_refused() -> None:
    with pytest.raises(DataError, match="class 1 has a single training image; it needs at least 2"):
        stratified_split(np.array([0, 0, 1, 2, 2]), 0.5, seed=0)


def test_the_length_of_a_split_is_its_number_of_images() -> None:
    assert len(Split(np.zeros((3, 1, 8, 8), np.uint8), np.zeros(3, np.int64))) == 3
