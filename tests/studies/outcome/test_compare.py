"""Check the comparison of studies, which is read from their exports."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from batchcam.errors import ConfigError
from studies.markdown import markdown_table
from studies.outcome.compare import bundles_table, compare, read, studies_table

STUDY = Path(__file__).parents[3] / "results" / "fashion"


def test_studies_stand_side_by_side_and_their_choices_beneath_each_other(
    tmp_path: Path, read_csv: Callable[[Path], list[dict[str, str]]]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(STUDY, other)
    shutil.rmtree(other / "best" / "knee")
    studies = [read(STUDY), read(other)]
    header, rows = studies_table(studies)
    assert header == ["", "fashion", "other"]
    cells = {name: values for name, *values in rows}
    states = [row["state"] for row in read_csv(STUDY / "trials.csv")]
    assert cells["trials"] == [str(len(states))] * 2
    assert cells["stopped early"] == [str(states.count("stopped"))] * 2
    # Each trial adds a strip: as wide as its accuracy, from the SSIM of the next more accurate
    # trial up to its own.
    front = sorted(studies[0].front.tolist())
    below = [ssim for _, ssim in front[1:]] + [0.0]
    area = sum(
        accuracy * (ssim - less) for (accuracy, ssim), less in zip(front, below, strict=True)
    )
    assert float(cells["hypervolume of the front"][0]) == pytest.approx(area, abs=1e-4)
    _, chosen = bundles_table(studies)
    assert [row[:2] for row in chosen] == [
        ["accuracy", "fashion"],
        ["accuracy", "other"],
        ["ssim", "fashion"],
        ["ssim", "other"],
        ["knee", "fashion"],
        ["baseline", "fashion"],
        ["baseline", "other"],
    ]
    best = json.loads((STUDY / "best" / "accuracy" / "metrics.json").read_text())
    assert float(chosen[0][2]) == pytest.approx(best["val_accuracy"], abs=5e-5)
    assert float(chosen[0][3]) == pytest.approx(best["test_accuracy"], abs=5e-5)
    assert chosen[-1][5] == "simple_cnn 28px cross-entropy"


def test_tables_are_written_and_other_data_sets_are_said(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(STUDY, other)
    table = other / "trials.csv"
    table.write_text(table.read_text().replace(",fashion_mnist,", ",digits,"))
    out = tmp_path / "comparison.md"
    compare((STUDY, other), out)
    text = out.read_text()
    assert markdown_table(*studies_table([read(STUDY), read(other)])) in text
    assert text.endswith("Different data sets: digits, fashion_mnist.\n")


def test_a_folder_without_a_study_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lacks the exports of a study"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="no study is given; name the folders"):
        compare(())
