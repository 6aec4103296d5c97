"""The search space: the values that a trial may take, and how its configuration is drawn.

The space is conditional. A weight is drawn only for a loss term that is on, a metric only if a term
compares CAMs, and an output stride only for a backbone that has several useful strides at the
resolution. Terms and default ranges of weights come from :data:`batchcam.losses.TERMS`. The space
is a record of data, so that command-line flags can change every part of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import optuna
import tyro

from batchcam.config import METRICS, MIN_RESOLUTION, Metric, TrialConfig
from batchcam.errors import BackboneError, ConfigError, suggest_names
from batchcam.losses import TERMS, compares_cams
from batchcam.losses.cross_entropy import CROSS_ENTROPY
from batchcam.models import feature_grid, resolve_output_stride

Range = tuple[float, float]
Strides = Mapping[tuple[str, int], tuple[int | None, ...]]
"""Output strides to choose from, by backbone and resolution; None: the backbone's own stride."""

SWITCHED = tuple(name for name in TERMS if name != CROSS_ENTROPY.name)
"""Loss terms that may be on or off in a trial. The cross-entropy is always on."""

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[SWITCHED]  # For the choices in --help.

SEARCHED = (
    ("backbone", False),
    ("resolution", False),
    ("output_stride", False),
    ("metric", False),
    *((f"lambda_{name}", name == CROSS_ENTROPY.name) for name in TERMS),
    ("learning_rate", True),
    ("weight_decay", True),
)
"""The fields that a search may set, and whether a plot's axis of the field is logarithmic. It is
linear for the weight of a term that may be off, because 0 is one of its values."""

_MIN_GRID = 3
"""Minimum cells per side of the CAM grid; see `batchcam.models.resolve_output_stride`."""


@dataclass(frozen=True, kw_only=True)
class _Space:
    """The fields of :class:`SearchSpace` that do not depend on the loss terms."""

    backbones: tuple[str, ...] = ("simple_cnn",)
    """Backbones to choose from."""
    resolutions: tuple[int, ...] = (28,)
    """Sides of the model's input to choose from, in pixels."""
    metrics: tuple[Metric, ...] = METRICS
    """Metrics to choose from: distances between CAM and prototype."""
    output_strides: tuple[int, ...] = (8, 16, 32)
    """Output strides to choose from, for backbones whose stride can be changed."""
    losses: Annotated[
        tuple[LossName, ...],
        tyro.conf.arg(
            help="Loss terms to search beside the cross-entropy: "
            + ", ".join(f"{name} ({TERMS[name].title})" for name in SWITCHED)
            + ". A trial has any subset of them."
        ),
    ] = ("proto", "batch")
    energy: bool = False
    """Search the prototype energy loss too; the same as naming energy in --losses."""
    exchange: bool = False
    """Search the prototype exchange loss too; the same as naming exchange in --losses."""
    learning_rate: Range = (5e-4, 1e-2)
    """Range of the peak learning rate."""
    weight_decay: Range = (1e-4, 1e-1)
    """Range of the weight decay."""

    def __post_init__(self) -> None:
        for choice in ("backbones", "resolutions", "metrics", "output_strides"):
            if not getattr(self, choice):
                raise ConfigError(f"{choice} is empty; name at least one.")
        for choice in ("backbones", "resolutions", "metrics", "output_strides", "losses"):
            values = getattr(self, choice)
            if len(set(values)) < len(values):
                raise ConfigError(f"{choice}={values} names a value twice; name each once.")
        for kind, known in (("metric", METRICS), ("losses", SWITCHED)):
            for value in self.metrics if kind == "metric" else self.losses:
                if value not in known:
                    raise ConfigError(
                        f"{kind} {value!r} is unknown; choose among {', '.join(known)}."
                        + suggest_names(value, known)
                    )
        for resolution in self.resolutions:
            if resolution < MIN_RESOLUTION:
                raise ConfigError(f"resolution {resolution} must be at least {MIN_RESOLUTION}.")
        for stride in self.output_strides:
            TrialConfig(output_stride=stride)  # Refuses an impossible stride.
        for name in ("learning_rate", "weight_decay", *(f"lambda_{term}" for term in TERMS)):
            low, high = getattr(self, name)
            if not (math.isfinite(high) and 0 < low <= high):
                raise ConfigError(
                    f"{name}=({low}, {high}) must be two finite numbers > 0, the lower "
                    "one first; the search tries every loss term turned off, too."
                )

    @property
    def switched(self) -> tuple[str, ...]:
        """Names of the searched terms without the cross-entropy, in the order of the registry."""
        flags = {"energy": self.energy, "exchange": self.exchange}
        return tuple(name for name in SWITCHED if name in self.losses or flags.get(name, False))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Weights of the terms that are not searched, as fields of TrialConfig."""
        return tuple(f"lambda_{name}" for name in SWITCHED if name not in self.switched)


if TYPE_CHECKING:

    class SearchSpace(_Space):
        """See below. Type checkers do not know the fields of the weights."""

        def __init__(self, **values: Any) -> None: ...

else:
    SearchSpace = make_dataclass(
        "SearchSpace",
        [
            (
                f"lambda_{spec.name}",
                Annotated[
                    Range,
                    tyro.conf.arg(help=f"Range of the weight of {spec.title}, if it is on."),
                ],
                field(default=spec.search_range),
            )
            for spec in TERMS.values()
        ],
        bases=(_Space,),
        namespace={
            "__doc__": """The values that trials may take.

            Ranges are (low, high), searched on a logarithmic scale. Each term of
            :data:`batchcam.losses.TERMS` has the range `lambda_<name>` of its weight.

            Raises:
                ConfigError: an empty, repeated or unknown choice, or an invalid range.
            """
        },
        frozen=True,
        kw_only=True,
    )
    SearchSpace.__module__ = __name__  # Needed by pickle.


def feasible_strides(space: SearchSpace, in_chans: int) -> Strides:
    """Return the output strides to try for each backbone and resolution.

    Of strides that give the same grid, only the largest, which costs least, is kept.

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
    """Draw a trial's fields of TrialConfig from the space, define-by-run.

    Optuna's parameters are the fields, and a switch `<name>_loss` for each searched term.

    Returns:
        Every field that the search sets; a term that is off has the weight 0.
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
    values: dict[str, Any] = {
        "backbone": backbone,
        "resolution": resolution,
        "output_stride": output_stride,
        "lambda_class": log_uniform("lambda_class"),
    }
    on = []
    for name in space.switched:
        if trial.suggest_categorical(f"{name}_loss", (False, True)):
            on.append(name)
            values[f"lambda_{name}"] = log_uniform(f"lambda_{name}")
        else:
            values[f"lambda_{name}"] = 0.0
    for name in space.left_out:
        if getattr(TrialConfig, name):  # On by default, but not searched.
            values[name] = 0.0
    for name in ("learning_rate", "weight_decay"):
        values[name] = log_uniform(name)
    if any(TERMS[name].compares_cams for name in on):
        values["metric"] = trial.suggest_categorical("metric", space.metrics)
    return values


def _stride_name(backbone: str, resolution: int) -> str:
    """Return a name per set of choices: Optuna allows one set of choices per parameter name."""
    return f"output_stride_{backbone}_{resolution}"


def point_of(config: TrialConfig, space: SearchSpace, strides: Strides) -> dict[str, Any]:
    """Return the Optuna parameters for which :func:`suggest` returns this configuration.

    Raises:
        ConfigError: the configuration is outside the space; the message has the flag to widen.
    """
    point: dict[str, Any] = {"backbone": config.backbone, "resolution": config.resolution}
    drawn = ["lambda_class", "learning_rate", "weight_decay"]
    for name in SWITCHED:
        weight = getattr(config, f"lambda_{name}")
        if name in space.switched:
            point[f"{name}_loss"] = weight > 0
        elif weight > 0:
            raise ConfigError(
                f"lambda_{name}={weight:g} is not searched by the study; allow it with --losses "
                f"{' '.join((*space.switched, name))}."
            )
        if weight > 0:
            drawn.append(f"lambda_{name}")
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
    """Return the points that every study tries first: the cross-entropy baseline and BCPL.

    They make every study a comparison of BCPL with its baseline.
    """

    def within(name: str, value: float) -> float:
        low, high = getattr(space, name)
        return float(min(max(value, low), high))

    baseline = {
        "backbone": space.backbones[0],
        "resolution": space.resolutions[0],
        "lambda_class": within("lambda_class", 1.0),
        "learning_rate": within("learning_rate", 3e-3),
        "weight_decay": within("weight_decay", 1e-2),
        **{f"{name}_loss": False for name in space.switched},
    }
    if "batch" not in space.switched:
        return [baseline]
    bcpl = baseline | {
        "batch_loss": True,
        "lambda_batch": within("lambda_batch", 0.1),
        "metric": space.metrics[0],
    }
    return [baseline, bcpl]
