"""Check merged classes of two digits, and that k-means separates the digits without labels."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from batchcam.config import TrialConfig
from batchcam.data.dataset import load_data
from batchcam.data.preprocessing import to_device
from studies.evidence.modes import METHODS, Modes, _partner, load_prepared, main, merged
from studies.evidence.workers import Workers


def test_neighbours_are_merged_and_nothing_else_changes() -> None:
    data = load_data(TrialConfig(dataset="digits"))
    pairs = merged(data)
    assert pairs.class_names == ("0 or 1", "2 or 3", "4 or 5", "6 or 7", "8 or 9")
    assert (pairs.test.images == data.test.images).all()
    assert (pairs.train.labels == data.train.labels // 2).all()
    assert _partner(torch.tensor([0, 1, 6, 9])).tolist() == [1, 0, 7, 8]


def test_k_means_finds_the_digits_of_a_pair() -> None:
    digits = torch.from_numpy(load_data(TrialConfig(dataset="digits")).train.labels)
    prepared = load_prepared("digits", "kmeans")
    groups = prepared.prototype_index("train")
    images, labels = to_device(prepared.dataset.train, torch.device("cpu"))
    assert len(images) == len(groups) == len(digits)
    assert torch.equal(groups // 2, labels)
    # For each group, the number of its images that show its most frequent digit.
    shown = [int(digits[groups == group].bincount().max()) for group in range(10)]
    assert sum(shown) / len(digits) > 0.85


@pytest.mark.faults
def test_the_study_is_written_as_table_and_figure(tmp_path: Path) -> None:
    methods = ("cross-entropy", "BCPL, L1, class means", "BCPL, L1, k-means")
    settings = Modes(
        out=tmp_path,
        dataset="digits",
        methods=methods,
        seeds=2,
        epochs=1,
        precision="fp32",
        device="cpu",
        workers=Workers(threads=1),
    )
    main(settings)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(made) == 6
    text = (tmp_path / "modes.md").read_text()
    assert text.count("\n") == 5
    assert "nan" not in text
    rows = list(csv.DictReader((tmp_path / "modes.csv").open()))
    assert [row["method"] for row in rows[::2]] == list(methods)
    with Image.open(tmp_path / "modes.png") as picture:
        assert picture.width > picture.height
    main(settings)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == made


def test_methods_with_k_means_have_a_counterpart_with_class_means() -> None:
    for method, fields in METHODS.items():
        if fields.get("prototype") == "kmeans":
            other = dict(METHODS[method.replace("k-means", "class means")])
            assert other == {name: v for name, v in fields.items() if name != "prototype"}
