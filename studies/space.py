"""The search space: which values may be tried, and how a trial's configuration is drawn from them.

The space is conditional: a λ that is off has no value, there is no metric where both CAM losses are
off, and an output stride is chosen only for a backbone that has several useful ones at that
resolution. What is allowed is data, so that a command line can change it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import optuna

from batchcam.config import METRICS, MIN_RESOLUTION, TrialConfig
from batchcam.errors import BackboneError, ConfigError, suggest_names
from batchcam.losses import compares_cams
from batchcam.models import feature_grid, resolve_output_stride

Range = tuple[float, float]
Strides = Mapping[tuple[str, int], tuple[int | None, ...]]
"""Output strides to choose from, by backbone and resolution; None is the backbone's own."""

SEARCHED = (
    ("backbone", False),
    ("resolution", False),
    ("output_stride", False),
    ("metric", False),
    ("lambda_class", True),
    ("lambda_proto", False),
    ("lambda_batch", False),
    ("lambda_energy", False),
    ("lambda_exchange", False),
    ("learning_rate", True),
    ("weight_decay", True),
)
"""What the search decides, and whether an axis of it is logarithmic: λ's may be 0, which a
logarithm has not."""

OPTIONAL = ("energy", "exchange")
"""Losses that are searched where they are asked for; others than the paper's."""

_MIN_GRID = 3
"""Cells per side of the CAM grid; see `batchcam.models.resolve_output_stride`."""


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The values that trials may take. Ranges are (low, high), searched on a logarithmic scale.

    Raises:
        ConfigError: an empty or unknown choice, or a range that is none.
    """

    backbones: tuple[str, ...] = ("simple_cnn",)
    """Backbones to choose from."""
    resolutions: tuple[int, ...] = (28,)
    """Input sizes to choose from, in pixels."""
    metrics: tuple[str, ...] = METRICS
    """Metrics to choose from: l1, l2, ssim."""
    output_strides: tuple[int, ...] = (8, 16, 32)
    """Output strides to choose from, for backbones that have them."""
    lambda_class: Range = (0.3, 3.0)
    """Range of the weight of the cross-entropy."""
    lambda_proto: Range = (0.01, 10.0)
    """Range of the weight of the Prototype Loss, where it is on."""
    lambda_batch: Range = (0.01, 10.0)
    """Range of the weight of the Batch-CAM Prototype Loss, where it is on."""
    energy: bool = False
    """Search the prototype energy loss too: evidence outside a class's support is penalised."""
    lambda_energy: Range = (0.3, 100.0)
    """Range of the weight of the prototype energy loss, where it is on."""
    exchange: bool = False
    """Search the prototype exchange loss too: what lies outside of two classes' supports may not
    decide between them."""
    lambda_exchange: Range = (0.03, 10.0)
    """Range of the weight of the prototype exchange loss, where it is on."""
    learning_rate: Range = (5e-4, 1e-2)
    """Range of the peak learning rate."""
    weight_decay: Range = (1e-4, 1e-1)
    """Range of the weight decay."""

    def __post_init__(self) -> None:
        for choice in ("backbones", "resolutions", "metrics", "output_strides"):
            values = getattr(self, choice)
            if not values:
                raise ConfigError(f"{choice} is empty; name at least one.")
            if len(set(values)) < len(values):
                raise ConfigError(f"{choice}={values} names a value twice; name each once.")
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(
                    f"metric {metric!r} is unknown; choose among {', '.join(METRICS)}."
                    + suggest_names(metric, METRICS)
                )
        for resolution in self.resolutions:
            if resolution < MIN_RESOLUTION:
                raise ConfigError(f"resolution {resolution} must be at least {MIN_RESOLUTION}.")
        for stride in self.output_strides:
            TrialConfig(output_stride=stride)  # Judges it; an impossible one would go unnoticed.
        for field in fields(self):
            if field.type == Range:
                low, high = getattr(self, field.name)
                if not (math.isfinite(high) and 0 < low <= high):
                    raise ConfigError(
                        f"{field.name}=({low}, {high}) must be two finite numbers > 0, the lower "
                        "one first; a loss term is turned off by the search itself."
                    )

    @property
    def left_out(self) -> tuple[str, ...]:
        """The weights that are not searched: of losses that must be asked for."""
        return tuple(f"lambda_{name}" for name in OPTIONAL if not getattr(self, name))


def feasible_strides(space: SearchSpace, in_chans: int) -> Strides:
    """Return the output strides worth trying for each backbone and resolution.

    Where several strides give the same grid, the largest (the cheapest) is kept.

    Raises:
        BackboneError: a backbone cannot be used at a resolution, with the remedy.
    """
    return {
        (backbone, resolution): _strides(space, backbone, resolution, in_chans)
        for backbone in space.backbones
        for resolution in space.resolutions
    }


def _strides(
    space: SearchSpace, backbone: str, resolution: int, in_chans: int
) -> tuple[int | None, ...]:
    by_grid: dict[tuple[int, int], int | None] = {}
    for stride in sorted(space.output_strides):
        try:
            grid = feature_grid(backbone, resolution, in_chans, stride)
        except BackboneError:
            continue
        if min(grid) >= _MIN_GRID:
            by_grid[grid] = stride
    return tuple(by_grid.values()) or (resolve_output_stride(backbone, resolution, in_chans),)


def suggest(trial: optuna.Trial, space: SearchSpace, strides: Strides) -> dict[str, Any]:
    """Draw a trial's fields of TrialConfig, as Ray's define-by-run interface asks for them.

    Optuna's parameters are the fields drawn, and the switches `proto_loss`, `batch_loss`,
    `energy_loss` and `exchange_loss`. Returned is every field that the space decides, those that
    were not drawn included.
    """

    def log_uniform(name: str) -> float:
        low, high = getattr(space, name)
        return trial.suggest_float(name, low, high, log=True)

    backbone = trial.suggest_categorical("backbone", space.backbones)
    resolution = trial.suggest_categorical("resolution", space.resolutions)
    strides_here = strides[backbone, resolution]
    output_stride: Any = strides_here[0]
    if len(strides_here) > 1:
        output_stride = trial.suggest_categorical(_stride_name(backbone, resolution), strides_here)
    proto_loss = trial.suggest_categorical("proto_loss", (False, True))
    batch_loss = trial.suggest_categorical("batch_loss", (False, True))
    decided: dict[str, Any] = {
        "backbone": backbone,
        "resolution": resolution,
        "output_stride": output_stride,
        "lambda_class": log_uniform("lambda_class"),
        "lambda_proto": log_uniform("lambda_proto") if proto_loss else 0.0,
        "lambda_batch": log_uniform("lambda_batch") if batch_loss else 0.0,
        "learning_rate": log_uniform("learning_rate"),
        "weight_decay": log_uniform("weight_decay"),
    }
    for name in OPTIONAL:
        if getattr(space, name):
            used = trial.suggest_categorical(f"{name}_loss", (False, True))
            decided[f"lambda_{name}"] = log_uniform(f"lambda_{name}") if used else 0.0
    if proto_loss or batch_loss:
        decided["metric"] = trial.suggest_categorical("metric", space.metrics)
    return decided


def _stride_name(backbone: str, resolution: int) -> str:
    """Return a name for each set of choices: Optuna's may not change under a name."""
    return f"output_stride_{backbone}_{resolution}"


def point_of(config: TrialConfig, space: SearchSpace, strides: Strides) -> dict[str, Any]:
    """Return the parameters by which :func:`suggest` gives this configuration.

    Raises:
        ConfigError: the space does not have it, with what to allow.
    """
    point: dict[str, Any] = {
        "backbone": config.backbone,
        "resolution": config.resolution,
        "proto_loss": config.lambda_proto > 0,
        "batch_loss": config.lambda_batch > 0,
    }
    drawn = ["lambda_class", "learning_rate", "weight_decay"]
    for name in OPTIONAL:
        weight = getattr(config, f"lambda_{name}")
        if getattr(space, name):
            point[f"{name}_loss"] = weight > 0
        elif weight > 0:
            raise ConfigError(
                f"lambda_{name}={weight:g} is not searched by the study; allow it with --{name}."
            )
    switched = ("lambda_proto", "lambda_batch", *(f"lambda_{name}" for name in OPTIONAL))
    drawn += [name for name in switched if getattr(config, name) > 0]
    point |= {name: getattr(config, name) for name in drawn}
    allowed: dict[str, tuple[Any, ...]] = {
        "backbone": space.backbones,
        "resolution": space.resolutions,
    }
    if compares_cams(config):
        point["metric"] = config.metric
        allowed["metric"] = space.metrics
    for name, choices in allowed.items():
        if point[name] not in choices:
            raise ConfigError(
                f"{name}={point[name]!r} is not among the study's {choices}; allow it with "
                f"--{name}s."
            )
    for name in drawn:
        low, high = getattr(space, name)
        if not low <= point[name] <= high:
            raise ConfigError(
                f"{name}={point[name]:g} is outside the study's range ({low:g}, {high:g}); widen "
                f"it with --{name.replace('_', '-')}."
            )
    strides_here = strides[config.backbone, config.resolution]
    if len(strides_here) > 1:
        if config.output_stride not in strides_here:
            raise ConfigError(
                f"output_stride={config.output_stride} of {config.backbone} at "
                f"{config.resolution} is not among the study's {strides_here}; allow it with "
                "--output-strides."
            )
        point[_stride_name(config.backbone, config.resolution)] = config.output_stride
    return point


def first_points(space: SearchSpace) -> list[dict[str, Any]]:
    """Return what every study tries first: the cross-entropy baseline, and the paper's BCPL.

    With them in, a study always says what the explanation in the loss has cost and brought.
    """

    def within(name: str, value: float) -> float:
        low, high = getattr(space, name)
        return float(min(max(value, low), high))

    baseline = {
        "backbone": space.backbones[0],
        "resolution": space.resolutions[0],
        "proto_loss": False,
        "batch_loss": False,
        "lambda_class": within("lambda_class", 1.0),
        "learning_rate": within("learning_rate", 3e-3),
        "weight_decay": within("weight_decay", 1e-2),
    }
    baseline |= {f"{name}_loss": False for name in OPTIONAL if getattr(space, name)}
    bcpl = baseline | {
        "batch_loss": True,
        "lambda_batch": within("lambda_batch", 0.1),
        "metric": space.metrics[0],
    }
    return [baseline, bcpl]
