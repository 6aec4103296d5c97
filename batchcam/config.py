"""The configuration of one training run: fields, defaults, validation, and its YAML file.

This module loads no data, model or device. It checks what the values alone decide; everything else
is checked where it is used.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import yaml

from batchcam.errors import ConfigError, suggest_names

Dataset = Literal[
    "digits", "mnist", "fashion_mnist", "decoy_mnist", "decoy_fashion_mnist", "imagefolder"
]
Metric = Literal["l1", "l2", "ssim"]
Cam = Literal["grad_cam", "hires_cam"]
Prototype = Literal["mean", "median", "kmeans"]
Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["one_cycle", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]

METRICS: tuple[Metric, ...] = get_args(Metric)

MIN_RESOLUTION = 8
"""Pixels. The SSIM window is 7 pixels wide, so a smaller image has at most one window position."""

EXTRA_TERMS = "extra_terms"
"""Key of a configuration file: the weights of a user's own loss terms, by name."""


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that determines one training run, validated on construction.

    Raises:
        ConfigError: a value that cannot work, with the value and the remedy.

    Example:
        >>> from batchcam import TrialConfig
        >>> TrialConfig(dataset="mnist", metric="ssim", lambda_batch=0.3).epochs
        5
        >>> TrialConfig(epochs=0)
        Traceback (most recent call last):
        batchcam.errors.ConfigError: epochs=0 ...
    """

    dataset: Dataset = "digits"
    """Data set. `digits` comes with scikit-learn; `imagefolder` reads the pictures in data_root."""
    data_root: str | None = None
    """Folder of the data set's files; searched before $BATCHCAM_DATA and ./data."""
    val_fraction: float = 0.1
    """Fraction of each class of the training set that is held out for validation."""
    split_seed: int = 0
    """Seed of the validation split; not `seed`, so that runs with other seeds share one split."""
    backbone: str = "simple_cnn"
    """simple_cnn, or the name of a convolutional timm model."""
    resolution: int = 28
    """Side of the model's input, in pixels."""
    output_stride: int | None = None
    """Pixels per cell of the CAM grid.
    None: the backbone's stride, or the largest dilated stride with a grid of at least 3x3 cells."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    metric: Metric = "l1"
    """Distance between CAM and prototype."""
    cam: Cam = "grad_cam"
    """CAM that is compared with prototypes. The paper uses grad_cam.
    hires_cam does not pool gradients over the grid; both are equal if the head pools features."""
    lambda_class: float = 1.0
    """Weight of the cross-entropy."""
    lambda_proto: float = 0.0
    """Weight of the Prototype Loss, per image; 0 turns a term off."""
    lambda_batch: float = 0.1
    """Weight of the Batch-CAM Prototype Loss (BCPL), per class in the batch."""
    lambda_energy: float = 0.0
    """Weight of the prototype energy loss, which penalises attribution off the class's support."""
    lambda_exchange: float = 0.0
    """Weight of the prototype exchange loss, which doubles the time of a step.
    It swaps background pixels between two images and penalises the change of their scores."""
    lambda_mask_gradient: float = 0.0
    """Weight of RRR (Ross et al. 2017), which penalises input gradients under masks.
    Only decoy_mnist and decoy_fashion_mnist have masks."""
    prototype: Prototype = "mean"
    """Prototype of a class: the mean of its images, as in the paper, or their pixelwise median.
    kmeans makes several prototypes per class, each the mean of a cluster."""
    clusters: int = 2
    """Prototypes per class for kmeans. Each image is compared with the nearest one."""
    epochs: int = 5
    """Passes over the training split, which are also the length of the learning-rate schedule."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 1e-2
    """Weight decay of the optimizer."""
    optimizer: Optimizer = "adamw"
    """sgd has Nesterov momentum: 0.9, or between 0.85 and 0.95 under one_cycle."""
    schedule: Schedule = "one_cycle"
    """Learning-rate schedule."""
    precision: Precision = "fp32"
    """Precision of the forward pass; bf16 and fp16 are by autocast, fp16 on CUDA only."""
    compile: bool = False
    """Compile the backbone's features with torch.compile; the head stays eager."""
    cuda_graphs: bool = True
    """Record the training step on a GPU and replay it, which is several times as fast for small
    models, with the same results. Other devices have no graphs, and train as without."""
    device: str = "auto"
    """auto (CUDA if there is a GPU, else the CPU), cpu, cuda, cuda:N or mps."""
    seed: int = 0
    """Seed of the initial weights, the order of batches and dropout."""

    def __post_init__(self) -> None:
        for name, value in list(self.as_dict().items()):
            object.__setattr__(self, name, _typed(name, value))
        for name in (*LAMBDAS, "weight_decay"):
            _require(self, name, lambda v: math.isfinite(v) and v >= 0, "a finite number >= 0")
        if not any(getattr(self, name) for name in LAMBDAS):
            raise ConfigError(
                f"{', '.join(LAMBDAS)} are all 0, so there is no loss to train on; set at least "
                "one of them above 0."
            )
        _require(self, "learning_rate", lambda v: math.isfinite(v) and v > 0, "a finite number > 0")
        _require(self, "val_fraction", lambda v: 0 < v < 1, "between 0 and 1, both excluded")
        for name in ("epochs", "batch_size", "clusters"):
            _require(self, name, lambda v: v >= 1, "at least 1")
        for name in ("seed", "split_seed"):
            _require(self, name, lambda v: 0 <= v < 2**32, "between 0 and 2**32 - 1")
        _require(
            self,
            "resolution",
            lambda v: v >= MIN_RESOLUTION,
            f"at least {MIN_RESOLUTION} pixels (the SSIM window is 7 wide)",
        )
        if self.output_stride is not None and self.output_stride not in (1, 2, 4, 8, 16, 32):
            raise ConfigError(
                f"output_stride={self.output_stride} must be 1, 2, 4, 8, 16 or 32; leave it out "
                "to have one chosen for the resolution."
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values, in the order of their declaration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from a mapping; fields left out take their defaults.

        Raises:
            ConfigError: a key that is no field, with the nearest field names.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"{key!r} is not a field of TrialConfig." + suggest_names(str(key), known)
                )
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, *, ignore_extra_terms: bool = False) -> Self:
        """Read a configuration that :meth:`to_yaml` or a person wrote.

        Args:
            path: the file.
            ignore_extra_terms: accept a run that was trained with a user's own loss terms, which
                a file cannot hold. Right for loading a model, wrong for training it again.

        Raises:
            ConfigError: the file is missing, is not a YAML mapping, holds a bad field, or names
                extra terms that are not to be ignored.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{path} cannot be read as YAML: {error}; give a config.yaml as in a bundle."
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path} holds {type(values).__name__}, not a mapping; write `field: value` lines."
            )
        extra = values.pop(EXTRA_TERMS, None) or {}
        if not isinstance(extra, dict):
            raise ConfigError(
                f"{path}: {EXTRA_TERMS}={extra!r} must map names of loss terms to weights; correct "
                "or remove it."
            )
        if extra and not ignore_extra_terms:
            raise ConfigError(
                f"{path} was trained with the extra loss terms {', '.join(extra)}, whose code it "
                f"does not hold; train it from Python by batchcam.fit(config, terms=...), or "
                f"remove {EXTRA_TERMS} from the file to train without them."
            )
        return cls.from_dict({name: _yaml_float(name, value) for name, value in values.items()})

    def to_yaml(self, path: str | Path, extra_terms: Mapping[str, float] | None = None) -> None:
        """Write every field, so that a change of a default does not change what the file means.

        Args:
            path: the file.
            extra_terms: weights of a user's own loss terms, recorded beside the fields.
        """
        values = self.as_dict() | ({EXTRA_TERMS: dict(extra_terms)} if extra_terms else {})
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


LAMBDAS = tuple(field.name for field in fields(TrialConfig) if field.name.startswith("lambda_"))
"""The weights of the loss terms, as fields of TrialConfig; see :mod:`batchcam.losses`."""
_HINTS: dict[str, Any] = get_type_hints(TrialConfig)


def _typed(name: str, value: Any) -> Any:
    """Return `value` as the field's type. An int is valid for a float: YAML writes 1.0 as 1."""
    hint = _HINTS[name]
    if get_origin(hint) is Literal:
        return _chosen(name, value, get_args(hint))
    allowed = get_args(hint) or (hint,)
    if value is None and NoneType in allowed:
        return None
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in allowed:
        expected = " or ".join(kind.__name__ for kind in allowed if kind is not NoneType)
        raise ConfigError(f"{name}={value!r} is {type(value).__name__}; expected {expected}.")
    return value


def _chosen(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(
            f"{name}={value!r} is unknown; choose one of {', '.join(choices)}."
            + suggest_names(str(value), choices)
        )
    return str(value)


def _yaml_float(name: str, value: Any) -> Any:
    """Read 3e-4 as a number. YAML 1.1 reads it as text, because it has no decimal point."""
    if isinstance(value, str) and _HINTS.get(name) is float:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _require(config: TrialConfig, name: str, valid: Any, remedy: str) -> None:
    value = getattr(config, name)
    if not valid(value):
        raise ConfigError(f"{name}={value!r} must be {remedy}.")
