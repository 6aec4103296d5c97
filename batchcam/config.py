"""The one record of a trial's configuration: its fields, their defaults, their validity, YAML.

Nothing here touches data, models or devices: what can be judged from the values alone is judged
here, the rest where it is used.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Self, get_args, get_type_hints

import yaml

from batchcam.errors import ConfigError, suggest_names

DATASETS = (
    "digits",
    "mnist",
    "fashion_mnist",
    "decoy_mnist",
    "decoy_fashion_mnist",
    "imagefolder",
)
METRICS = ("l1", "l2", "ssim")
CAMS = ("grad_cam", "hires_cam")
PROTOTYPES = ("mean", "median", "kmeans")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("one_cycle", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
MIN_RESOLUTION = 8
"""Pixels. The SSIM window is 7 pixels wide; a smaller image leaves it nothing to compare."""

EXTRA_TERMS = "extra_terms"
"""Key of a configuration file: weights of loss terms that are not of this project, by name."""

_CHOICES = {
    "dataset": DATASETS,
    "metric": METRICS,
    "cam": CAMS,
    "prototype": PROTOTYPES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
}


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that determines one training run, validated on construction.

    Raises:
        ConfigError: a value that cannot work, with the value and the remedy.
    """

    dataset: str = "digits"
    """digits, mnist, fashion_mnist, decoy_mnist, decoy_fashion_mnist or imagefolder."""
    data_root: str | None = None
    """Where the data set's files are; searched before $BATCHCAM_DATA and ./data."""
    val_fraction: float = 0.1
    """Share of the training set, per class, kept for validation."""
    split_seed: int = 0
    """Seed of the validation split; apart from `seed`, so that seeds share one split."""
    backbone: str = "simple_cnn"
    """simple_cnn, or the name of any convolutional timm model."""
    resolution: int = 28
    """Side of the model's input, in pixels."""
    output_stride: int | None = None
    """Pixels per cell of the CAM grid; None takes the backbone's own, or the largest dilated one
    that still gives a grid of 3x3."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    metric: str = "l1"
    """Distance between CAM and prototype: l1, l2 or ssim."""
    cam: str = "grad_cam"
    """What is compared with prototypes: grad_cam (the paper's), or hires_cam, whose gradients are
    not pooled: faithful where the head tells cells apart, as simple_cnn's does; else the same."""
    lambda_class: float = 1.0
    """Weight of the cross-entropy."""
    lambda_proto: float = 0.0
    """Weight of the Prototype Loss (per image); 0 turns it off."""
    lambda_batch: float = 0.1
    """Weight of the Batch-CAM Prototype Loss (per class in the batch); 0 turns it off."""
    lambda_energy: float = 0.0
    """Weight of the prototype energy loss, which penalises attribution off the support of the
    class; 0 turns it off."""
    lambda_exchange: float = 0.0
    """Weight of the prototype exchange loss, which swaps background pixels between two images and
    penalises the change of their scores; 0 turns it off. It doubles the time of a step."""
    lambda_mask_gradient: float = 0.0
    """Weight of RRR (Ross et al. 2017), which penalises input gradients under the masks of a
    data set that has masks (decoy_mnist, decoy_fashion_mnist); 0 turns it off."""
    prototype: str = "mean"
    """How a class prototype is made from its images: mean (the paper's), pixelwise median, or
    kmeans: several per class, each the mean of a cluster."""
    clusters: int = 2
    """Prototypes per class where they are made by kmeans; each image goes with the nearest."""
    epochs: int = 5
    """Passes over the training split; the length of the learning-rate schedule."""
    batch_size: int = 128
    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 1e-2
    optimizer: str = "adamw"
    """adamw or sgd (Nesterov momentum: 0.9, or between 0.85 and 0.95 as one_cycle moves it)."""
    schedule: str = "one_cycle"
    """one_cycle or constant."""
    precision: str = "fp32"
    """fp32, or autocast to bf16 or fp16 (fp16 only on CUDA)."""
    compile: bool = False
    """Compile the backbone's features with torch.compile; the head stays eager."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:N or mps."""
    seed: int = 0
    """Seed of the initial weights, the order of batches and dropout."""

    def __post_init__(self) -> None:
        for name, value in list(self.as_dict().items()):
            object.__setattr__(self, name, _typed(name, value))
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"{name}={value!r} is unknown; choose one of {', '.join(known)}."
                    + suggest_names(value, known)
                )
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
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path} holds {type(values).__name__}, not a mapping of field names to values."
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
        """Write every field, so that the file stays true when a default changes.

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
    """Return `value` as the field's type; an int will do for a float, as YAML writes 1.0 as 1."""
    allowed = get_args(_HINTS[name]) or (_HINTS[name],)
    if value is None and NoneType in allowed:
        return None
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in allowed:
        expected = " or ".join(kind.__name__ for kind in allowed if kind is not NoneType)
        raise ConfigError(f"{name}={value!r} is {type(value).__name__}; expected {expected}.")
    return value


def _yaml_float(name: str, value: Any) -> Any:
    """Read what a person means by 3e-4, which YAML 1.1 takes for text, for want of a dot."""
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
