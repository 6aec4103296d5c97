"""Check the Decoy study: λ is chosen on validation images alone; one command runs all methods."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from studies.evidence import right_reasons
from studies.evidence.right_reasons import CLEAN, METHODS, RightReasons, candidates, main
from studies.evidence.runs import Run, complete
from studies.evidence.workers import Workers

# --- The Decoy study -------------------------------------------------------------------------


def _settings(out: Path, *methods: str) -> RightReasons:
    return RightReasons(
        out=out,
        datasets=("mnist",),
        methods=methods,
        seeds=2,
        epochs=1,
        precision="fp32",
        workers=Workers(threads=1),
        device="cpu",
    )


@pytest.mark.usefixtures("on_digits")
def test_the_study_is_made_and_goes_on_and_is_written_as_tables(tmp_path: Path) -> None:
    settings = _settings(tmp_path, CLEAN, "prototype energy")
    main(settings)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    # Selection runs only for the method with several λ; two final seeds for each method.
    assert len(made) == len(METHODS["prototype energy"]) + 2 + 2
    selection = [json.loads(path.read_text()) for path in made if "selection" in path.parts]
    assert not any("test" in name for content in selection for name in content["metrics"])
    table = (tmp_path / "decoy.md").read_text()
    assert table.count("\n") == 4
    assert " ± " in table
    final = [json.loads(path.read_text()) for path in made if "final" in path.parts]
    accuracy = {
        (content["method"], content["seed"]): content["metrics"]["test_accuracy_random_decoys"]
        for content in final
    }
    differences = [accuracy["prototype energy", seed] - accuracy[CLEAN, seed] for seed in (0, 1)]
    header, _, clean, energy = (line.split("|") for line in table.splitlines())
    column = header.index(" difference to clean data, points ")
    assert clean[column].strip() == ""
    assert energy[column].split()[0] == f"{50 * sum(differences):+.2f}"
    assert (tmp_path / "decoy.csv").read_text().count("\n") == 5
    main(replace(settings, table_only=True))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == made
    assert (tmp_path / "decoy.md").read_text() == table


@pytest.mark.usefixtures("on_digits")
def test_the_clean_reference_is_trained_without_decoys_and_tested_with_them(
    tmp_path: Path,
) -> None:
    main(_settings(tmp_path, right_reasons.CLEAN))
    contents = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert {content["config"]["dataset"] for content in contents} == {"mnist"}
    assert all("attribution_on_patch" in content["metrics"] for content in contents)


def test_lambda_is_chosen_by_the_validation_images_with_random_patches(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "prototype energy")
    runs = candidates(settings, "mnist", "prototype energy")
    scores = iter([(0.5, 0.9), (0.7, 0.6), (0.6, 0.8), (0.6, 0.7), (0.5, 0.9)])

    def measure(_: Run) -> dict[str, float]:
        random_patches, own_patches = next(scores)
        return {
            "validation_accuracy_random_decoys": random_patches,
            "validation_accuracy": own_patches,
        }

    table = replace(settings, table_only=True)
    cell = ("mnist", "prototype energy")
    complete(tmp_path, runs[:2], measure)
    assert right_reasons.choose(table, [cell]) == {}
    complete(tmp_path, runs, measure)
    assert right_reasons.choose(table, [cell]) == {cell: runs[1]}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_set_of_configurations(method: str, tmp_path: Path) -> None:
    runs = candidates(_settings(tmp_path), "fashion_mnist", method)
    assert len({run.path(tmp_path) for run in runs}) == len(runs)
    assert all(run.study == "decoy_fashion_mnist" for run in runs)
    clean = "clean data" in method
    assert {run.config.dataset for run in runs} == {
        "fashion_mnist" if clean else "decoy_fashion_mnist"
    }


# --- A reference: RRR with the true masks ----------------------------------------------------


@pytest.mark.faults
@pytest.mark.usefixtures("on_digits")
def test_rrr_is_trained_with_the_masks_and_its_weight_is_kept(tmp_path: Path) -> None:
    main(_settings(tmp_path, "RRR, given the masks"))
    contents = [json.loads(path.read_text()) for path in tmp_path.rglob("selection/*.json")]
    assert sorted(content["beyond"]["rrr"] for content in contents) == [0.1, 1, 10, 100]
    validation = {content["metrics"]["validation_accuracy"] for content in contents}
    assert len(validation) > 1
    assert "| RRR, given the masks | rrr " in (tmp_path / "decoy.md").read_text()
