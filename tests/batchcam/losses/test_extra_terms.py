"""Tests of a user's own loss term in training, metrics, bundles and saved states."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import batchcam
from batchcam.cli.main import main
from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.errors import ConfigError
from batchcam.export.bundle import save_bundle
from batchcam.export.model_card import loss_name
from batchcam.losses import TERMS, Batch, Compute, TermContext, TermSpec
from batchcam.training.fit import EpochReport, TrialResult, fit, restore

CONFIG = TrialConfig(resolution=14, epochs=2, batch_size=32, device="cpu", lambda_batch=0.2)


def _build(context: TermContext) -> Compute:
    cells = context.grid[0] * context.grid[1]

    def compute(batch: Batch) -> Tensor:
        return batch.attribution_NHW.abs().sum(dim=(1, 2)).mean() / cells

    return compute


SPARSE = TermSpec(
    name="sparse", title="sparse attribution", source="ours", search_range=(0.1, 10.0), build=_build
)


@pytest.fixture(scope="module")
def result(tiny_prepared: PreparedData) -> TrialResult:
    return fit(CONFIG, prepared=tiny_prepared, terms=[(SPARSE, 30.0)])


def test_the_term_is_trained_and_reported(result: TrialResult, tiny_prepared: PreparedData) -> None:
    assert [name for name in result.metrics if name.startswith("loss")] == [
        "loss",
        "loss_class",
        "loss_batch",
        "loss_sparse",
    ]
    total = sum(
        weight * result.metrics[f"loss_{name}"]
        for name, weight in (("class", 1.0), ("batch", 0.2), ("sparse", 30.0))
    )
    assert result.metrics["loss"] == pytest.approx(total, rel=1e-5)
    weak = fit(CONFIG, prepared=tiny_prepared, terms=[(SPARSE, 1e-6)])
    assert result.metrics["loss_sparse"] < 0.7 * weak.metrics["loss_sparse"]


def test_a_bundle_names_the_term_and_can_be_loaded(result: TrialResult, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bundle", result, command="python mine.py")
    written = yaml.safe_load((tmp_path / "bundle" / "config.yaml").read_text())
    assert written["extra_terms"] == {"sparse": 30.0}
    assert "sparse attribution 30" in (tmp_path / "bundle" / "README.md").read_text()
    metrics = json.loads((tmp_path / "bundle" / "metrics.json").read_text())
    assert metrics["history"][-1]["loss_sparse"] == result.metrics["loss_sparse"]
    model = batchcam.load(tmp_path / "bundle")
    images = result.prepared.dataset.test.images[:5]
    assert len(model.predict(images)) == 5
    assert model.config == CONFIG


@pytest.mark.parametrize("command", ["train", "verify"])
def test_the_command_line_refuses_to_train_without_the_term(
    command: str, result: TrialResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    save_bundle(bundle, result, command="python mine.py")
    arguments = {
        "train": ["train", "--config", str(bundle / "config.yaml"), "--out", str(tmp_path / "two")],
        "verify": ["verify", str(bundle)],
    }
    with pytest.raises(SystemExit) as ended:
        main(arguments[command])
    assert ended.value.code == 2
    assert "extra loss terms sparse, whose code it does not hold" in capsys.readouterr().err


def test_a_saved_state_belongs_to_its_terms(tiny_prepared: PreparedData, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"

    def stop(report: EpochReport) -> bool:
        report.save_state(state)
        return True

    fit(CONFIG, stop, prepared=tiny_prepared, terms=[(SPARSE, 30.0)])
    with pytest.raises(ConfigError, match=r"saved with extra_terms=\{'sparse': 30.0\}, not \{\}"):
        fit(CONFIG, prepared=tiny_prepared, state=state)
    resumed = fit(CONFIG, prepared=tiny_prepared, state=state, terms=[(SPARSE, 30.0)])
    whole = fit(CONFIG, prepared=tiny_prepared, terms=[(SPARSE, 30.0)])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    restored = restore(CONFIG, state, prepared=tiny_prepared, terms=[(SPARSE, 30.0)])
    assert restored.metrics["epoch"] == 1


def test_names_and_weights_that_cannot_be_are_refused(tiny_prepared: PreparedData) -> None:
    for spec, weight, message in (
        (replace(SPARSE, name="batch"), 1.0, "name of the extra term 'batch' must be"),
        (replace(SPARSE, name="not a name"), 1.0, "'not a name' must be an identifier"),
        (SPARSE, 0.0, "weight 0 of the extra term sparse"),
        (SPARSE, float("nan"), "weight nan of the extra term sparse"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(CONFIG, prepared=tiny_prepared, terms=[(spec, weight)])
    with pytest.raises(ConfigError, match="taken are class, proto"):
        fit(CONFIG, prepared=tiny_prepared, terms=[(SPARSE, 1.0), (SPARSE, 1.0)])


@pytest.mark.parametrize("name", [name for name in TERMS if name != "class"])
def test_the_terms_of_the_project_are_named_by_their_titles(name: str) -> None:
    config = TrialConfig.from_dict({"lambda_batch": 0.0, f"lambda_{name}": 0.5})
    assert loss_name(config).startswith(f"{TERMS[name].title} 0.5")
