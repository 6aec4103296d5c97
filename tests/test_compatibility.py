"""Check that files of earlier versions stay readable and still produce the same tables.

The files are the committed ones in results/.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import batchcam
from batchcam.config import TrialConfig
from studies import paths
from studies.engine.ledger import LEDGER, Ledger
from studies.evidence import paper, right_reasons
from studies.outcome.export import collect, pareto_front, read_bundles
from studies.settings import load_settings

ROOT = Path(__file__).parents[1]


def committed(pattern: str) -> list[Path]:
    """Return the committed files of results/ whose path matches a glob pattern of git."""
    done = subprocess.run(
        ["git", "ls-files", "-z", f":(glob)results/{pattern}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in done.stdout.split("\0") if name]


CONFIGS = committed("**/config.yaml")
BUNDLES = [path.parent for path in committed("**/model.safetensors")]
STUDIES = [path.parent for path in committed(f"**/{paths.SETTINGS}")]


def test_there_are_files_of_each_kind() -> None:
    assert len(CONFIGS) >= 10
    assert len(BUNDLES) >= 10
    assert [path.parent for path in committed(f"**/{LEDGER}")] == STUDIES != []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configuration_is_read_with_every_field_that_it_names(path: Path) -> None:
    config = TrialConfig.from_yaml(path)
    shown = dict(line.split(": ", 1) for line in path.read_text().splitlines() if ": " in line[1:])
    assert shown
    for name, value in shown.items():
        assert str(config.as_dict()[name]) == _plain(value), name


def _plain(value: str) -> str:
    """Return a YAML scalar in the form in which Python prints the value."""
    return {"null": "None", "true": "True", "false": "False"}.get(value, value.strip("'"))


@pytest.mark.parametrize("folder", BUNDLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_bundle_is_loaded_and_explains(folder: Path) -> None:
    model = batchcam.load(folder)
    assert model.metrics == json.loads((folder / "metrics.json").read_text())
    side, channels = model.config.resolution, model.channels
    images = np.random.default_rng(0).integers(0, 256, (2, channels, side, side), dtype=np.uint8)
    probabilities = model.probabilities(images)
    assert probabilities.shape == (2, len(model.class_names))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    maps = model.explain(images)
    assert maps.shape == (2, side, side)
    assert maps.min() >= 0
    assert 0.99 < maps.max() <= 1


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: str(path.relative_to(ROOT)))
def test_study_is_read_with_its_front_and_its_bundles(folder: Path) -> None:
    settings = load_settings(folder / paths.SETTINGS)
    stored = json.loads((folder / paths.SETTINGS).read_text())
    assert (settings.study, settings.key) == (stored["study"], stored["key"])
    assert list(settings.objectives) == stored["objectives"]
    ledger = Ledger(folder / LEDGER)
    lines = [json.loads(line) for line in (folder / LEDGER).read_text().splitlines()]
    assert len(ledger.trials) == sum(line["event"] == "proposed" for line in lines)
    reports = [line["metrics"] for line in lines if line["event"] == "report"]
    assert [metrics for _, metrics in ledger.reports] == reports != []
    records = collect(ledger, settings.base_config(), settings.checkpoints)
    front = pareto_front(records, settings.objective_records)
    exported = json.loads((folder / "pareto.json").read_text())["trials"]
    assert [(record.trial_id, record.state, record.metrics) for record in front] == [
        (trial["trial_id"], trial["state"], trial["metrics"]) for trial in exported
    ]
    for record, trial in zip(front, exported, strict=True):
        assert trial["config"].items() <= record.config.as_dict().items()
    bundles = read_bundles(folder / "best")
    assert set(bundles) == {path.name for path in (folder / "best").iterdir()}
    known = {record.trial_id: record.config for record in records}
    for config, metrics in bundles.values():
        assert config == known[metrics["trial_id"]]


def test_every_run_of_the_evidence_has_a_configuration_that_is_read() -> None:
    runs = committed("*/runs/**/*.json")
    assert len(runs) > 400
    for path in runs:
        stored = json.loads(path.read_text())["config"]
        assert stored.items() <= TrialConfig.from_dict(stored).as_dict().items(), path


def copied(name: str, folder: Path) -> Path:
    """Copy the runs of an evidence command without its tables; return the new folder."""
    target = folder / name
    shutil.copytree(ROOT / "results" / name / "runs", target / "runs")
    return target


def check_tables(name: str, made: Path, *tables: str) -> None:
    """Check that regenerated tables equal the committed ones byte for byte."""
    for table in tables:
        assert (made / table).read_bytes() == (ROOT / "results" / name / table).read_bytes()


def test_table_of_the_decoy_study_is_made_again_from_its_runs(tmp_path: Path) -> None:
    out = copied("right_reasons", tmp_path)
    right_reasons.main(right_reasons.RightReasons(out=out, table_only=True))
    check_tables("right_reasons", out, "decoy.md", "decoy.csv")


def test_tables_of_the_paper_are_made_again_from_their_runs(tmp_path: Path) -> None:
    out = copied("paper", tmp_path)
    backbones = ("simple_cnn", "resnet18", "convnextv2_tiny")
    paper.main(paper.Paper(out=out, backbones=backbones, table_only=True))
    check_tables("paper", out, "accuracy_28.md", "explanations_28.md", "runs_28.csv")
