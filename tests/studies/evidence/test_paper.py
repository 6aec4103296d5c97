"""Check Table 1: settings and λ are chosen on validation; only final runs read the test split."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from batchcam.config import TrialConfig
from studies.evidence.paper import (
    CONDITIONS,
    EPOCHS,
    PUBLISHED,
    Cell,
    Paper,
    cells_of,
    choose,
    final_runs,
    main,
)
from studies.evidence.runs import Run, complete
from studies.evidence.workers import Workers


def _settings(out: Path, *conditions: str) -> Paper:
    return Paper(
        out=out,
        datasets=("mnist",),
        conditions=conditions,
        seeds=2,
        epochs=1,
        selection_epochs=1,
        precision="fp32",
        workers=Workers(threads=1),
        device="cpu",
    )


@pytest.mark.usefixtures("on_digits")
def test_the_table_is_filled_and_goes_on(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "cross-entropy", "BCPL, L1")
    main(replace(settings, seeds=1))
    table = (tmp_path / "accuracy_28.md").read_text().splitlines()
    assert len(table) == 4
    assert " ± " not in table[3]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    # Three learning rates, three λ, and one seed for each of two losses.
    assert len(before) == 3 + 3 + 2
    selection = [json.loads(path.read_text()) for path in before if "selection" in path.parts]
    assert not any("test" in name for content in selection for name in content["metrics"])
    main(settings)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2
    table = (tmp_path / "accuracy_28.md").read_text().splitlines()
    assert "| BCPL, L1 |" in table[3]
    assert "99.00" in table[3]
    assert table[3].count(" ± ") == 2
    explained = (tmp_path / "explanations_28.md").read_text()
    assert "nan" not in explained.lower()
    rows = list(csv.DictReader((tmp_path / "runs_28.csv").open()))
    assert [(row["loss"], row["seed"]) for row in rows] == [
        ("cross-entropy", "0"),
        ("cross-entropy", "1"),
        ("BCPL, L1", "0"),
        ("BCPL, L1", "1"),
    ]
    main(replace(settings, table_only=True, conditions=(*settings.conditions, "BCPL, L2")))
    table = (tmp_path / "accuracy_28.md").read_text().splitlines()
    assert table[4].startswith("| simple_cnn | mnist | BCPL, L2 |  | 0 |  |")


def test_the_learning_rate_is_chosen_before_lambda_and_both_by_validation(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "BCPL, SSIM")
    cell = Cell("simple_cnn", "mnist", "BCPL, SSIM")
    accuracy = {(1e-3, 0.0): 0.8, (3e-3, 0.0): 0.7, (6e-3, 0.0): 0.9}
    accuracy |= {(6e-3, 0.03): 0.5, (6e-3, 0.1): 0.6, (6e-3, 0.3): 0.55}

    def measure(run: Run) -> dict[str, float]:
        point = (run.config.learning_rate, run.config.lambda_batch)
        return {"validation_accuracy": accuracy[point]}

    def made(run: list[Run]) -> None:
        complete(tmp_path, run, measure)

    assert choose(replace(settings, table_only=True), [cell]) == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studies.evidence.paper._complete", lambda _, runs: made(runs))
        chosen = choose(settings, [cell])[cell]
    assert (chosen.config.learning_rate, chosen.config.lambda_batch) == (6e-3, 0.1)
    assert chosen.config.metric == "ssim"
    assert choose(replace(settings, table_only=True), [cell]) == {cell: chosen}


def test_other_resolutions_take_over_what_was_chosen(tmp_path: Path) -> None:
    settings = replace(
        _settings(tmp_path, "BCPL, L1"), resolution=112, output_strides=(32, 8), epochs=2
    )
    cells = cells_of(settings)
    assert [cell.study for cell in cells] == ["mnist_simple_cnn_112_32", "mnist_simple_cnn_112_8"]
    assert {cell.selection for cell in cells} == {"mnist_simple_cnn"}
    chosen = Run(
        study="mnist_simple_cnn",
        method="m",
        stage="selection",
        config=TrialConfig(dataset="mnist", learning_rate=6e-3, epochs=1),
    )
    first, second = final_runs(settings, cells[0], chosen)
    assert (first.config.resolution, first.config.output_stride) == (112, 32)
    assert (first.config.learning_rate, first.config.epochs) == (6e-3, 2)
    assert [first.config.seed, second.config.seed] == [0, 1]
    assert first.path(tmp_path) != final_runs(settings, cells[1], chosen)[0].path(tmp_path)


def test_published_figures_stand_beside_cells_of_the_table(tmp_path: Path) -> None:
    for backbone, resolution, dataset, condition in PUBLISHED:
        assert backbone in EPOCHS
        assert resolution in (28, 112)
        assert dataset in Paper(out=tmp_path).datasets
        assert condition in CONDITIONS
    assert len(CONDITIONS) == 7


@pytest.mark.faults
def test_the_command_shares_its_runs_out_to_processes(tmp_path: Path) -> None:
    words = (
        f"{sys.executable} -m studies.evidence.paper --out {tmp_path} --datasets digits "
        "--conditions cross-entropy --seeds 1 --epochs 1 --selection-epochs 1 --precision fp32 "
        "--workers.threads 1 --workers.at-once 2 --device cpu"
    )
    subprocess.run(words.split(), check=True)
    content = json.loads(next(tmp_path.rglob("final/*.json")).read_text())
    assert content["command"].startswith("python -m studies.evidence.paper --out ")
    assert 0 < content["metrics"]["test_accuracy"] < 1
