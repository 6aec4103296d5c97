"""Tests of TrialConfig: valid values, invalid values and their errors, and YAML."""

import math
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchcam.config import (
    METRICS,
    Cam,
    Dataset,
    Optimizer,
    Precision,
    Prototype,
    Schedule,
    TrialConfig,
)
from batchcam.data.sources import LOADERS
from batchcam.errors import ConfigError
from batchcam.explainers import EXPLAINERS
from batchcam.prototypes import KINDS
from batchcam.similarity import METRICS as METRIC_FUNCTIONS

weights = st.floats(0, 1e6)
configs = st.builds(
    TrialConfig,
    dataset=st.sampled_from(get_args(Dataset)),
    data_root=st.none() | st.text(st.characters(codec="utf-8"), max_size=20),
    val_fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
    split_seed=st.integers(0, 2**32 - 1),
    backbone=st.text(st.characters(codec="utf-8"), max_size=20),
    resolution=st.integers(8, 1024),
    output_stride=st.sampled_from([None, 1, 2, 4, 8, 16, 32]),
    pretrained=st.booleans(),
    metric=st.sampled_from(METRICS),
    lambda_class=st.floats(1e-9, 1e6),
    lambda_proto=weights,
    lambda_batch=weights,
    prototype=st.sampled_from(get_args(Prototype)),
    epochs=st.integers(1, 10**6),
    batch_size=st.integers(1, 10**6),
    learning_rate=st.floats(0, 1e6, exclude_min=True),
    weight_decay=weights,
    optimizer=st.sampled_from(get_args(Optimizer)),
    schedule=st.sampled_from(get_args(Schedule)),
    precision=st.sampled_from(get_args(Precision)),
    compile=st.booleans(),
    device=st.sampled_from(["auto", "cpu", "cuda:1"]),
    seed=st.integers(0, 2**32 - 1),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs)
def test_yaml_brings_back_every_field(tmp_path: Path, config: TrialConfig) -> None:
    config.to_yaml(tmp_path / "config.yaml")
    assert TrialConfig.from_yaml(tmp_path / "config.yaml") == config


@given(configs)
def test_a_dictionary_brings_back_every_field(config: TrialConfig) -> None:
    assert TrialConfig.from_dict(config.as_dict()) == config


def test_every_field_is_written_in_order(tmp_path: Path) -> None:
    TrialConfig().to_yaml(tmp_path / "config.yaml")
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [field.name for field in fields(TrialConfig)]


def test_fields_left_out_of_yaml_take_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("epochs: 7\nlambda_batch: 1\n")
    config = TrialConfig.from_yaml(tmp_path / "c.yaml")
    assert config == TrialConfig(epochs=7, lambda_batch=1.0)
    assert type(config.lambda_batch) is float


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        TrialConfig().epochs = 3  # type: ignore[misc]
    assert replace(TrialConfig(), epochs=3).epochs == 3


def test_every_choice_has_an_implementation() -> None:
    assert set(get_args(Dataset)) == set(LOADERS)
    assert set(get_args(Cam)) == set(EXPLAINERS)
    assert set(METRICS) == set(METRIC_FUNCTIONS)
    assert set(get_args(Prototype)) == {*KINDS, "kmeans"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "ssmi"}, "metric='ssmi' is unknown; choose one of l1, l2, ssim.*mean ssim?"),
        ({"dataset": "fashion-mnist"}, "'fashion-mnist' is unknown.*mean fashion_mnist"),
        ({"prototype": "mode"}, "prototype='mode' is unknown; choose one of mean, median"),
        ({"optimizer": "adam"}, "optimizer='adam' is unknown.*mean adamw?"),
        ({"schedule": "cosine"}, "schedule='cosine' is unknown; choose one of one_cycle, constant"),
        ({"precision": "fp8"}, "precision='fp8' is unknown; choose one of fp32, bf16, fp16"),
        ({"lambda_class": -1.0}, "lambda_class=-1.0 must be a finite number >= 0"),
        ({"lambda_proto": math.nan}, "lambda_proto=nan must be a finite number >= 0"),
        ({"lambda_batch": math.inf}, "lambda_batch=inf must be a finite number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be"),
        ({"lambda_class": 0.0, "lambda_batch": 0.0}, "all 0.*set at least one of them above 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a finite number > 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be"),
        ({"val_fraction": 0.0}, "val_fraction=0.0 must be between 0 and 1, both excluded"),
        ({"val_fraction": 1.0}, "val_fraction=1.0 must be between"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"batch_size": -4}, "batch_size=-4 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be between 0 and 2\*\*32 - 1"),
        ({"split_seed": 2**32}, "split_seed=4294967296 must be"),
        ({"resolution": 7}, "resolution=7 must be at least 8 pixels"),
        ({"output_stride": 3}, "output_stride=3 must be 1, 2, 4, 8, 16 or 32; leave it out"),
        ({"epochs": 2.5}, "epochs=2.5 is float; expected int"),
        ({"epochs": "3"}, "epochs='3' is str; expected int"),
        ({"epochs": True}, "epochs=True is bool; expected int"),
        ({"learning_rate": "3e-3"}, "learning_rate='3e-3' is str; expected float"),
        ({"lambda_proto": True}, "lambda_proto=True is bool; expected float"),
        ({"pretrained": 1}, "pretrained=1 is int; expected bool"),
        ({"backbone": None}, "backbone=None is NoneType; expected str"),
        ({"data_root": 5}, "data_root=5 is int; expected str"),
        ({"output_stride": "8"}, "output_stride='8' is str; expected int"),
    ],
)
def test_a_bad_value_is_named_with_its_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrialConfig(**values)


def test_a_key_that_is_no_field_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'lamda_batch' is not a field.*mean lambda_batch"):
        TrialConfig.from_dict({"lamda_batch": 0.1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs: [1", "cannot be read as YAML"),
        (b"\xff\xfe\xff", "cannot be read as YAML"),
        (b"- epochs\n- 3\n", "holds list, not a mapping"),
        (b"", "holds NoneType, not a mapping"),
        (b"3: 4\n", "3 is not a field"),
        (b"!!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
    ],
)
def test_yaml_that_is_no_configuration_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        TrialConfig.from_yaml(path)


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        TrialConfig.from_yaml(tmp_path / "nowhere.yaml")


def test_a_number_that_yaml_takes_for_text_is_read_as_meant(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 3e-4\n")
    assert TrialConfig.from_yaml(path).learning_rate == 3e-4


def test_extra_terms_that_are_no_mapping_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("epochs: 2\nextra_terms: 3\n")
    with pytest.raises(ConfigError, match="extra_terms=3 must map names of loss terms to weights"):
        TrialConfig.from_yaml(path)
