"""Studies side by side, read from what they exported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchcam.errors import ConfigError
from studies.compare import Compare, bundles_table, main, read, studies_table
from studies.evidence.tables import markdown

STUDY = Path(__file__).parents[2] / "results" / "fashion_mnist"


def test_studies_stand_side_by_side_and_their_choices_beneath_each_other(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(STUDY, other)
    shutil.rmtree(other / "best" / "knee")
    studies = [read(STUDY), read(other)]
    header, rows = studies_table(studies)
    assert header == ["", "fashion_mnist", "other"]
    cells = {name: values for name, *values in rows}
    assert cells["trials"] == ["12", "12"]
    assert cells["stopped early"] == ["7", "7"]
    # Three on the front: 0.9292 x 0.3630 and what the two others add to that area.
    front = sorted(studies[0].front.tolist())
    below = [ssim for _, ssim in front[1:]] + [0.0]
    area = sum(
        accuracy * (ssim - less) for (accuracy, ssim), less in zip(front, below, strict=True)
    )
    assert float(cells["its hypervolume"][0]) == pytest.approx(area, abs=1e-4)
    _, chosen = bundles_table(studies)
    assert [row[:2] for row in chosen] == [
        ["accuracy", "fashion_mnist"],
        ["accuracy", "other"],
        ["ssim", "fashion_mnist"],
        ["ssim", "other"],
        ["knee", "fashion_mnist"],
    ]
    assert chosen[0][2:5] == ["0.9292", "0.9277", "0.363 / 0.954"]
    assert chosen[0][5] == "simple_cnn 28px Prototype Loss 0.0249 (L2)"


def test_tables_are_written_and_other_data_sets_are_said(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(STUDY, other)
    table = other / "trials.csv"
    table.write_text(table.read_text().replace(",fashion_mnist,", ",digits,"))
    out = tmp_path / "comparison.md"
    main(Compare(folders=(STUDY, other), out=out))
    text = out.read_text()
    assert markdown(*studies_table([read(STUDY), read(other)])) in text
    assert text.endswith("Different data sets: digits, fashion_mnist.\n")


def test_a_folder_without_a_study_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not hold what a study exports"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="name the folders"):
        main(Compare(folders=()))
    command = [sys.executable, "-m", "studies.compare", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} does not hold")
