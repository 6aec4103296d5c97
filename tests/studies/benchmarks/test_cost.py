"""Check the measured cost of models and losses against operation counts known by hand."""

import json
from pathlib import Path

import pytest
import torch

from studies.benchmarks.cost import Cost, main, operations


def test_operations_of_a_matrix_product_are_counted() -> None:
    one, other = torch.ones(3, 5), torch.ones(5, 7)
    assert operations(lambda: one @ other) == 2 * 3 * 5 * 7


def test_the_explanation_adds_little_and_the_rivals_more(tmp_path: Path) -> None:
    main(Cost(out=tmp_path, backbones=("simple_cnn",), batch_size=8, seconds=0, threads=1))
    (entry,) = json.loads((tmp_path / "cost.json").read_text())["models"]
    training = entry["training_gflops"]
    base = training["cross-entropy"]
    # The backward pass has two products for each one of the forward pass, except in the first
    # layer.
    assert 2.5 < base / entry["forward_gflops"] <= 3
    for name in ("BCPL, L1", "Prototype Loss, L1"):
        assert 1 <= training[name] / base < 1.02
    assert training["pytorch-grad-cam beside cross-entropy"] / base > 1.9
    text = (tmp_path / "cost.md").read_text()
    assert text.count("\n") == 2 + len(training)
    assert f"| {entry['parameters']:,} |" in text
    assert entry["images_per_second"] == {}


def test_steps_are_timed_where_that_is_asked_for(tmp_path: Path) -> None:
    main(Cost(out=tmp_path, backbones=("simple_cnn",), batch_size=4, seconds=0.1, threads=1))
    (entry,) = json.loads((tmp_path / "cost.json").read_text())["models"]
    assert entry["images_per_second"].keys() == entry["training_gflops"].keys()
    assert all(rate > 0 for rate in entry["images_per_second"].values())


@pytest.mark.parametrize("backbone", ["resnet18"])
def test_a_deep_model_explains_at_the_same_cost(backbone: str, tmp_path: Path) -> None:
    main(Cost(out=tmp_path, backbones=(backbone,), batch_size=2, seconds=0, threads=1))
    (entry,) = json.loads((tmp_path / "cost.json").read_text())["models"]
    training = entry["training_gflops"]
    assert 1 <= training["BCPL, SSIM"] / training["cross-entropy"] < 1.01
