import math
from dataclasses import replace
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from batchcam.config import METRICS, TrialConfig
from batchcam.errors import BackboneError, ConfigError
from batchcam.losses import TERMS, compares_cams
from studies.space import (
    SEARCHED,
    SWITCHED,
    SearchSpace,
    Strides,
    feasible_strides,
    first_points,
    point_of,
    suggest,
)
from studies.trial import trial_config

SPACE = SearchSpace(
    backbones=("simple_cnn", "resnet18"), resolutions=(28, 112), energy=True, exchange=True
)


@pytest.fixture(scope="module")
def strides() -> Strides:
    return feasible_strides(SPACE, in_chans=1)


@pytest.fixture(scope="module")
def drawn(strides: Strides) -> list[tuple[optuna.Trial, TrialConfig]]:
    """Return 200 random draws: Optuna's trial, and the configuration made from it."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(200)]
    return [(t, trial_config(TrialConfig(), suggest(t, SPACE, strides))) for t in trials]


def test_every_draw_is_a_valid_configuration_within_the_space(
    drawn: list[tuple[optuna.Trial, TrialConfig]],
) -> None:
    assert {config.backbone for _, config in drawn} == set(SPACE.backbones)
    assert {config.resolution for _, config in drawn} == set(SPACE.resolutions)
    for _, config in drawn:
        for name in ("lambda_class", "learning_rate", "weight_decay"):
            low, high = getattr(SPACE, name)
            assert low <= getattr(config, name) <= high


def test_metric_is_drawn_only_where_a_cam_loss_is_on(
    drawn: list[tuple[optuna.Trial, TrialConfig]],
) -> None:
    assert {trial.params.get("metric") for trial, _ in drawn} == {None, *SPACE.metrics}
    for trial, config in drawn:
        assert ("metric" in trial.params) == compares_cams(config)


@pytest.mark.parametrize(
    ("switch", "weight"),
    [
        ("proto_loss", "lambda_proto"),
        ("batch_loss", "lambda_batch"),
        ("energy_loss", "lambda_energy"),
        ("exchange_loss", "lambda_exchange"),
    ],
)
def test_weight_of_a_loss_is_drawn_only_where_it_is_on(
    drawn: list[tuple[optuna.Trial, TrialConfig]], switch: str, weight: str
) -> None:
    low, high = getattr(SPACE, weight)
    assert {trial.params[switch] for trial, _ in drawn} == {False, True}
    for trial, config in drawn:
        if trial.params[switch]:
            assert low <= getattr(config, weight) <= high
        else:
            assert getattr(config, weight) == 0.0
            assert weight not in trial.params


@pytest.mark.parametrize(
    "name", ["lambda_class", "lambda_proto", "lambda_batch", "learning_rate", "weight_decay"]
)
def test_weights_and_rates_are_searched_on_a_logarithmic_scale(
    drawn: list[tuple[optuna.Trial, TrialConfig]], name: str
) -> None:
    low, high = getattr(SPACE, name)
    values = [trial.params[name] for trial, _ in drawn if name in trial.params]
    below = sum(value < math.sqrt(low * high) for value in values)
    assert 0.35 < below / len(values) < 0.65
    distributions = [trial.distributions[name] for trial, _ in drawn if name in trial.params]
    assert all(getattr(distribution, "log", False) for distribution in distributions)


def test_output_stride_is_drawn_only_where_there_is_a_choice(
    drawn: list[tuple[optuna.Trial, TrialConfig]],
) -> None:
    for trial, config in drawn:
        stride_params = [name for name in trial.params if name.startswith("output_stride")]
        if (config.backbone, config.resolution) == ("resnet18", 112):
            assert stride_params == ["output_stride_resnet18_112"]
            assert config.output_stride in (8, 16, 32)
        else:
            assert stride_params == []


def test_strides_are_those_with_a_usable_grid(strides: Strides) -> None:
    # At 112 pixels resnet18 has grids of 14, 7 and 4 cells per side; at 28 pixels, of 4, 2 and 1.
    assert strides["resnet18", 112] == (8, 16, 32)
    assert strides["resnet18", 28] == (8,)
    assert strides["simple_cnn", 28] == (None,)


def test_of_strides_with_one_grid_the_largest_is_kept() -> None:
    # The first layer of efficientnet_b0 halves the image: strides 1 and 2 give the same grid.
    space = SearchSpace(backbones=("efficientnet_b0",), output_strides=(4, 2, 1))
    assert feasible_strides(space, in_chans=1)["efficientnet_b0", 28] == (2, 4)


def test_backbone_without_a_feasible_stride_gets_the_resolved_one() -> None:
    space = SearchSpace(backbones=("resnet18",), resolutions=(28,), output_strides=(32,))
    assert feasible_strides(space, in_chans=1) == {("resnet18", 28): (8,)}


def test_unknown_backbone_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(BackboneError, match=r"'resnet_18' is unknown.*Did you mean.*resnet18"):
        feasible_strides(SearchSpace(backbones=("resnet_18",)), in_chans=1)


def test_backbone_that_is_infeasible_at_a_resolution_is_refused_with_the_remedy() -> None:
    space = SearchSpace(backbones=("resnet18",), resolutions=(8,))
    with pytest.raises(BackboneError, match=r"resnet18 reduces 8x8.*use a larger resolution"):
        feasible_strides(space, in_chans=1)


@pytest.mark.parametrize(
    "space",
    [
        SPACE,
        SearchSpace(
            lambda_class=(2.0, 3.0),
            lambda_batch=(1.0, 2.0),
            learning_rate=(1e-4, 1e-3),
            weight_decay=(0.05, 0.1),
            metrics=("ssim",),
        ),
    ],
)
def test_first_points_lie_in_the_space(space: SearchSpace) -> None:
    strides = feasible_strides(space, in_chans=1)
    study = optuna.create_study()
    for point in first_points(space):
        study.enqueue_trial(point)
        trial = study.ask()
        suggest(trial, space, strides)
        # Optuna replaces values outside the space, with a warning.
        assert trial.params.items() >= point.items()


def test_first_points_are_the_baseline_and_the_papers_bcpl(strides: Strides) -> None:
    study = optuna.create_study()
    configs = []
    for point in first_points(SPACE):
        study.enqueue_trial(point)
        configs.append(trial_config(TrialConfig(), suggest(study.ask(), SPACE, strides)))
    baseline, bcpl = configs
    assert not compares_cams(baseline)
    assert (bcpl.metric, bcpl.lambda_proto, bcpl.lambda_batch) == ("l1", 0.0, 0.1)
    assert bcpl.learning_rate == baseline.learning_rate == 3e-3


def test_first_points_are_clipped_to_narrow_ranges() -> None:
    space = SearchSpace(learning_rate=(1e-4, 1e-3), lambda_batch=(1.0, 2.0))
    baseline, bcpl = first_points(space)
    assert baseline["learning_rate"] == bcpl["learning_rate"] == 1e-3
    assert bcpl["lambda_batch"] == 1.0


@pytest.mark.parametrize("name", ["backbones", "resolutions", "metrics", "output_strides"])
def test_empty_choice_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is empty; name at least one"):
        SearchSpace(**{name: ()})


@pytest.mark.parametrize(
    ("name", "values"),
    [("backbones", ("resnet18", "resnet18")), ("resolutions", (28, 28)), ("metrics", ("l1", "l1"))],
)
def test_choice_given_twice_is_refused(name: str, values: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.*names a value twice; name each once"):
        SearchSpace(**{name: values})


def test_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'sim' is unknown; .*l1, l2, ssim.* Did you mean ssim"):
        SearchSpace(metrics=("sim",))


def test_resolution_below_the_ssim_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="resolution 4 must be at least 8"):
        SearchSpace(resolutions=(28, 4))


@pytest.mark.parametrize(
    "bad", [(1.0, 0.1), (0.0, 1.0), (-1.0, 1.0), (1.0, math.inf), (math.nan, 1.0), (1.0, math.nan)]
)
@pytest.mark.parametrize("name", ["lambda_class", "lambda_proto", "learning_rate"])
def test_range_that_is_none_is_refused(name: str, bad: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=\(.*\) must be two finite numbers > 0"):
        SearchSpace(**{name: bad})


def test_output_stride_that_no_backbone_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="output_stride=7 must be 1, 2, 4, 8, 16 or 32"):
        SearchSpace(output_strides=(7,))


STRIDES: Strides = {
    ("simple_cnn", 28): (None,),
    ("simple_cnn", 112): (None,),
    ("resnet18", 28): (8,),
    ("resnet18", 112): (8, 16, 32),
}
"""The strides that `feasible_strides` finds; see `test_strides_are_those_with_a_usable_grid`."""


def log_uniform(name: str) -> st.SearchStrategy[float]:
    return st.floats(*getattr(SPACE, name))


@st.composite
def configs(draw: st.DrawFn) -> TrialConfig:
    """Draw any configuration of the space."""
    backbone = draw(st.sampled_from(SPACE.backbones))
    resolution = draw(st.sampled_from(SPACE.resolutions))
    switched = st.just(0.0)
    config = TrialConfig(
        backbone=backbone,
        resolution=resolution,
        output_stride=draw(st.sampled_from(STRIDES[backbone, resolution])),
        lambda_class=draw(log_uniform("lambda_class")),
        lambda_proto=draw(switched | log_uniform("lambda_proto")),
        lambda_batch=draw(switched | log_uniform("lambda_batch")),
        lambda_energy=draw(switched | log_uniform("lambda_energy")),
        lambda_exchange=draw(switched | log_uniform("lambda_exchange")),
        learning_rate=draw(log_uniform("learning_rate")),
        weight_decay=draw(log_uniform("weight_decay")),
    )
    return (
        replace(config, metric=draw(st.sampled_from(METRICS))) if compares_cams(config) else config
    )


@given(configs())
def test_point_of_a_configuration_gives_it_again(config: TrialConfig) -> None:
    trial = FixedTrial(point_of(config, SPACE, STRIDES))
    assert trial_config(TrialConfig(), suggest(trial, SPACE, STRIDES)) == config  # type: ignore[arg-type]
    # Every value of the point is used.
    assert trial.params == point_of(config, SPACE, STRIDES)


def test_first_points_are_points_of_their_configurations() -> None:
    for point in first_points(SPACE):
        params = suggest(FixedTrial(point), SPACE, STRIDES)  # type: ignore[arg-type]
        assert point_of(trial_config(TrialConfig(), params), SPACE, STRIDES) == point


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "resnet50"}, r"backbone='resnet50' is not among .*; allow it with --backb"),
        (
            {"resolution": 56},
            r"resolution=56 is not among .*\(28, 112\); allow it with --resolutio",
        ),
        (
            {"metric": "ssim", "lambda_batch": 0.1},
            r"metric='ssim' is not among the study's \('l1',\); allow it with --metrics",
        ),
        (
            {"learning_rate": 0.5},
            r"learning_rate=0.5 is outside .*\(0.0005, 0.01\); widen it with --learning-rate",
        ),
        ({"lambda_batch": 99.0}, r"lambda_batch=99 is outside .*; widen it with --lambda-batch"),
        (
            {"backbone": "resnet18", "resolution": 112, "output_stride": 4},
            r"output_stride=4 of resnet18 at 112 is not among .*; allow it with --output-strides",
        ),
    ],
)
def test_configuration_that_the_space_does_not_have_is_refused_with_the_remedy(
    fields: dict[str, Any], message: str
) -> None:
    space = replace(SPACE, metrics=("l1",))
    config = TrialConfig(**{"learning_rate": 3e-3, "weight_decay": 1e-2, **fields})
    with pytest.raises(ConfigError, match=message):
        point_of(config, space, STRIDES)


@pytest.mark.parametrize("name", [n for n in SWITCHED if n not in ("proto", "batch")])
def test_losses_beyond_the_paper_are_searched_where_they_are_asked_for(name: str) -> None:
    space = replace(SPACE, losses=("proto", "batch"), energy=False, exchange=False)
    for point in first_points(space):
        drawn = suggest(FixedTrial(point), space, STRIDES)  # type: ignore[arg-type]
        assert f"lambda_{name}" not in drawn
    with pytest.raises(
        ConfigError, match=rf"lambda_{name}=2 is not .*--losses proto batch {name}\."
    ):
        point_of(TrialConfig.from_dict({f"lambda_{name}": 2.0}), space, STRIDES)


def test_metric_of_a_configuration_without_a_cam_loss_does_not_matter() -> None:
    config = TrialConfig(metric="ssim", lambda_batch=0.0)
    assert "metric" not in point_of(config, replace(SPACE, metrics=("l1",)), STRIDES)


def test_flags_of_single_losses_are_the_same_as_naming_them() -> None:
    assert SearchSpace(energy=True).switched == ("proto", "batch", "energy")
    assert SearchSpace(losses=("exchange", "batch"), exchange=True).switched == (
        "batch",
        "exchange",
    )


def test_terms_that_are_not_searched_are_off() -> None:
    space = SearchSpace(losses=("mask_gradient",))
    strides = feasible_strides(space, in_chans=1)
    (baseline,) = first_points(space)
    for on in (False, True):
        point = baseline | {"mask_gradient_loss": on, "lambda_mask_gradient": 2.0}
        drawn = suggest(FixedTrial(point), space, strides)  # type: ignore[arg-type]
        config = trial_config(TrialConfig(), drawn)
        assert (config.lambda_proto, config.lambda_batch) == (0.0, 0.0)
        assert config.lambda_mask_gradient == (2.0 if on else 0.0)
        assert "metric" not in drawn


@pytest.mark.parametrize("name", ["class", "enerxy"])
def test_a_term_that_cannot_be_searched_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"losses '{name}' is unknown; choose among proto, batch"):
        SearchSpace(losses=(name,))


def test_every_term_has_a_range_and_an_axis() -> None:
    for name, spec in TERMS.items():
        assert getattr(SearchSpace(), f"lambda_{name}") == spec.search_range
        assert f"lambda_{name}" in dict(SEARCHED)


def test_a_term_is_not_taken_for_a_field_of_the_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.space.SWITCHED", ("batch", "metrics"))
    assert SearchSpace(losses=("batch",)).switched == ("batch",)
