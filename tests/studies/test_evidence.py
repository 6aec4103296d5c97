"""The evidence: runs made once, measures with known answers, λ chosen on validation alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from batchcam.config import TrialConfig
from batchcam.data import ImageData, load_data, to_device
from batchcam.decoy import paint_decoys, paint_random_decoys
from batchcam.errors import ConfigError
from batchcam.inputs import Inputs
from batchcam.prototypes import class_prototypes
from studies.evidence import right_reasons
from studies.evidence.right_reasons import METHODS, RightReasons, candidates, main
from studies.evidence.runs import Run, complete, finished
from studies.evidence.workers import Workers

# --- Runs -----------------------------------------------------------------------------------


def _run(seed: int, **fields: float) -> Run:
    config = TrialConfig(seed=seed, **fields)  # type: ignore[arg-type]
    return Run(study="small", method="BCPL, L1", stage="final", config=config)


def test_a_run_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    made: list[int] = []

    def measure(run: Run) -> dict[str, float]:
        if run.config.seed == 2 and len(made) == 2:
            raise KeyboardInterrupt
        made.append(run.config.seed)
        return {"accuracy": run.config.seed / 10}

    runs = [_run(seed) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path, runs, measure)
    assert [content["seed"] for content in finished(tmp_path, runs)] == [0, 1]
    made.append(-1)
    contents = complete(tmp_path, runs, measure)
    assert made == [0, 1, -1, 2, 3]
    assert [content["metrics"]["accuracy"] for content in contents] == [0.0, 0.1, 0.2, 0.3]
    assert {"git_commit", "versions", "command", "threads"} <= set(contents[0])
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    complete(tmp_path, [_run(0, epochs=3)], lambda run: {"epochs": run.config.epochs})
    with pytest.raises(ConfigError, match=r"made with epochs=3, not 4; remove it"):
        finished(tmp_path, [_run(0, epochs=4)])
    assert finished(tmp_path, [_run(0, epochs=3)])[0]["metrics"] == {"epochs": 3}


def test_a_run_from_before_a_field_was_there_had_its_default(tmp_path: Path) -> None:
    complete(tmp_path, [_run(0)], lambda run: {"epochs": run.config.epochs})
    path = _run(0).path(tmp_path)
    content = json.loads(path.read_text())
    del content["config"]["clusters"]
    path.write_text(json.dumps(content))
    assert len(finished(tmp_path, [_run(0)])) == 1
    with pytest.raises(ConfigError, match="made with clusters=2, not 3"):
        finished(tmp_path, [_run(0, clusters=3)])


def test_runs_that_differ_in_a_weight_have_files_of_their_own(tmp_path: Path) -> None:
    runs = [_run(0), _run(1), _run(0, lambda_batch=1.0), _run(0, lambda_energy=1.0)]
    assert len({run.path(tmp_path) for run in runs}) == len(runs)


# --- The Decoy study -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> dict[str, ImageData]:
    """Three hundred digits, clean and with decoys, under the names of the real data sets."""
    digits = load_data(TrialConfig(dataset="digits"))
    clean = replace(digits, train=digits.train.take(np.arange(300)))
    generator = np.random.default_rng(0)
    decoyed = replace(
        clean,
        train=paint_decoys(clean.train, clean.train.labels, generator),
        validation=paint_decoys(clean.validation, clean.validation.labels, generator),
        test=paint_random_decoys(clean.test, 10, generator),
    )
    return {"mnist": clean, "decoy_mnist": decoyed}


@pytest.fixture
def on_digits(small: dict[str, ImageData], monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(dataset: str, prototype: str) -> Inputs:
        data = small[dataset]
        train, validation = (
            class_prototypes(*to_device(split, torch.device("cpu")), 10, prototype)
            for split in (data.train, data.validation)
        )
        return Inputs(data, train, validation)

    monkeypatch.setattr(right_reasons, "_inputs", inputs)
    monkeypatch.setattr(right_reasons, "_EXPLAINED", 40)


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
    settings = _settings(tmp_path, "cross-entropy", "prototype energy")
    main(settings)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    # One λ to choose from and three; two seeds each.
    assert len(made) == 3 + 2 + 2
    selection = [json.loads(path.read_text()) for path in made if "selection" in path.parts]
    assert not any("test" in name for content in selection for name in content["metrics"])
    table = (tmp_path / "decoy.md").read_text()
    assert table.count("\n") == 4
    assert " ± " in table
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
    scores = iter([(0.5, 0.9), (0.7, 0.6), (0.6, 0.8)])

    def measure(_: Run) -> dict[str, float]:
        random_patches, own_patches = next(scores)
        return {
            "validation_accuracy_random_decoys": random_patches,
            "validation_accuracy": own_patches,
        }

    table = replace(settings, table_only=True)
    cell = ("mnist", "prototype energy")
    complete(tmp_path, runs[:2], measure)
    assert right_reasons._choose(table, [cell]) == {}
    complete(tmp_path, runs, measure)
    assert right_reasons._choose(table, [cell]) == {cell: runs[1]}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_set_of_configurations(method: str, tmp_path: Path) -> None:
    runs = candidates(_settings(tmp_path), "fashion_mnist", method)
    assert len({run.path(tmp_path) for run in runs}) == len(runs)
    assert all(run.study == "decoy_fashion_mnist" for run in runs)
    clean = method == right_reasons.CLEAN
    assert {run.config.dataset for run in runs} == {
        "fashion_mnist" if clean else "decoy_fashion_mnist"
    }


# --- The ceiling -----------------------------------------------------------------------------


@pytest.mark.usefixtures("on_digits")
def test_rrr_is_trained_with_the_masks_and_its_weight_is_kept(tmp_path: Path) -> None:
    main(_settings(tmp_path, "RRR, given the masks"))
    contents = [json.loads(path.read_text()) for path in tmp_path.rglob("selection/*.json")]
    assert sorted(content["beyond"]["rrr"] for content in contents) == [1, 10, 100]
    validation = {content["metrics"]["validation_accuracy"] for content in contents}
    assert len(validation) > 1
    assert "| RRR, given the masks | rrr 1" in (tmp_path / "decoy.md").read_text()
