"""Tests of training: results, reproducibility, bit-identical resumption, and errors."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from batchcam.cam import attribution, score_gradients
from batchcam.config import Cam, Metric, TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.data.preprocessing import to_device
from batchcam.errors import BackboneError, ConfigError, DivergedError, FormatError
from batchcam.prototypes import cluster_centres, cluster_prototypes, nearest_prototype_index
from batchcam.similarity import ssim
from batchcam.training.fit import (
    STATE_FORMAT,
    EpochReport,
    Hardware,
    Metrics,
    Trainer,
    TrialResult,
    fit,
    load_state,
    restore,
)

TIMINGS = ("images_per_second", "seconds")
KEYS = {
    "epoch",
    "loss",
    "val_accuracy",
    "cam_ssim",
    "cam_ssim_sample",
    "cam_ssim_ceiling",
    *TIMINGS,
}


def _untimed(history: list[Metrics]) -> list[Metrics]:
    return [{k: v for k, v in epoch.items() if k not in TIMINGS} for epoch in history]


def _assert_same_run(one: TrialResult, other: TrialResult) -> None:
    assert _untimed(one.history) == _untimed(other.history)
    weights = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def _save_each(folder: Path) -> Callable[[EpochReport], None]:
    def save(report: EpochReport) -> None:
        report.save_state(folder / f"{report.epoch}.pt")

    return save


# --- Results of a run ------------------------------------------------------------------------


def test_a_run_learns(trained: TrialResult) -> None:
    first, last = trained.history[0], trained.metrics
    assert [epoch["epoch"] for epoch in trained.history] == [1, 2, 3]
    assert last["loss"] < first["loss"]
    assert last["val_accuracy"] > 0.5
    assert last["cam_ssim"] > first["cam_ssim"]
    assert last["cam_ssim"] <= last["cam_ssim_ceiling"] <= 1


def test_metrics_are_flat_numbers_and_rates_positive(trained: TrialResult) -> None:
    for epoch in trained.history:
        assert set(epoch) == KEYS | {"loss_class", "loss_batch"}
        assert all(isinstance(value, int | float) for value in epoch.values())
        assert epoch["images_per_second"] > 0
        assert epoch["seconds"] > 0


def test_the_result_is_ready_for_use(trained: TrialResult, tiny_config: TrialConfig) -> None:
    assert not trained.model.training
    assert trained.grid == (7, 7)
    assert trained.preprocess.resolution == 14
    assert trained.config == tiny_config
    assert trained.evaluation.accuracy == trained.metrics["val_accuracy"]


@pytest.mark.parametrize(
    ("proto", "batch", "terms"),
    [
        (0.0, 0.0, {"loss_class"}),
        (0.5, 0.0, {"loss_class", "loss_proto"}),
        (0.5, 0.5, {"loss_class", "loss_proto", "loss_batch"}),
    ],
)
def test_only_terms_with_a_weight_are_reported(
    tiny_prepared: PreparedData,
    tiny_config: TrialConfig,
    proto: float,
    batch: float,
    terms: set[str],
) -> None:
    config = replace(tiny_config, epochs=1, lambda_proto=proto, lambda_batch=batch)
    metrics = fit(config, prepared=tiny_prepared).metrics
    assert set(metrics) == KEYS | terms
    weights = {"loss_class": 1.0, "loss_proto": proto, "loss_batch": batch}
    expected = sum(weights[name] * metrics[name] for name in terms)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_losses_are_means_over_images_not_batches(tiny_prepared: PreparedData) -> None:
    # The weights do not move, so the mean of the epoch must not depend on the batch size.
    losses = [
        fit(
            TrialConfig(
                resolution=16,
                epochs=1,
                batch_size=batch_size,
                learning_rate=1e-30,
                lambda_batch=0.0,
                lambda_proto=1.0,
                backbone="convnextv2_atto",  # Without batch normalisation.
                output_stride=8,
                optimizer="sgd",
                device="cpu",
            ),
            prepared=tiny_prepared,
        ).metrics["loss"]
        for batch_size in (150, 200)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("cam", ["grad_cam", "hires_cam"])
@pytest.mark.parametrize("metric", ["l1", "l2", "ssim"])
def test_every_metric_brings_cams_closer_than_cross_entropy(
    tiny_prepared: PreparedData, tiny_config: TrialConfig, metric: Metric, cam: Cam
) -> None:
    config = replace(tiny_config, metric=metric, cam=cam, lambda_batch=1.0)
    baseline = fit(replace(config, lambda_batch=0.0), prepared=tiny_prepared)
    guided = fit(config, prepared=tiny_prepared)
    assert guided.metrics["cam_ssim"] > baseline.metrics["cam_ssim"]


@pytest.mark.parametrize("batch_size", [199, 1000], ids=["last of one", "beyond the data"])
def test_any_batch_size_covers_the_data(
    tiny_prepared: PreparedData, tiny_config: TrialConfig, batch_size: int
) -> None:
    steps = []
    config = replace(tiny_config, epochs=1, batch_size=batch_size, lambda_proto=0.1)
    result = fit(
        config, prepared=tiny_prepared, on_step=lambda done, total: steps.append((done, total))
    )
    count = 2 if batch_size < 200 else 1
    assert steps == [(n + 1, count) for n in range(count)]
    assert result.metrics["images_per_second"] > 0


def test_training_on_true_digits_prepares_its_own_data() -> None:
    config = TrialConfig(resolution=8, epochs=1, device="cpu", prototype="median")
    prepared = prepare(config)
    result = fit(config)
    assert torch.equal(result.prepared.train_prototypes, prepared.train_prototypes)
    assert result.metrics["val_accuracy"] > 0.5


def test_images_are_aligned_with_their_own_cluster(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    """Check that a cluster's CAM is closer to its prototype than to the other of its class."""
    images, labels = to_device(tiny_prepared.dataset.train, torch.device("cpu"))
    centres = cluster_centres(images, labels, 10, 2)
    groups = nearest_prototype_index(images, labels, centres, 10)
    prototypes = cluster_prototypes(images, groups, centres)
    prepared = PreparedData(tiny_prepared.dataset, prototypes, prototypes, centres)
    config = replace(tiny_config, prototype="kmeans", lambda_batch=1.0, metric="ssim", epochs=8)
    result = fit(config, prepared=prepared)
    trained = result.evaluator.evaluate(prepared.split("train", 14))
    other = prepared.prototypes("train", 14).view(10, 2, 14, 14).flip(1).flatten(0, 1)
    assert trained.cam_ssim > ssim(trained.maps_PRR, other).mean() + 0.05
    assert result.evaluation.confusion_CC.shape == (10, 10)


def test_the_energy_loss_moves_the_evidence_into_the_support(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    plain = fit(replace(tiny_config, lambda_batch=0.0), prepared=tiny_prepared)
    config = replace(tiny_config, lambda_batch=0.0, lambda_energy=3.0)
    assert not tiny_prepared.off_support_mask((7, 7)).all()
    aligned = fit(config, prepared=tiny_prepared)
    assert _share_outside(aligned) < 0.5 * _share_outside(plain)
    assert set(aligned.metrics) == set(plain.metrics) | {"loss_energy"}


def _share_outside(result: TrialResult) -> float:
    images, labels = to_device(result.prepared.dataset.test, torch.device("cpu"))
    features = result.model.features(result.preprocess(images)).detach().requires_grad_()
    logits = result.model.head(features)
    gradients = score_gradients(logits, features, labels, create_graph=False)
    evidence = attribution(gradients, features).detach().abs()
    outside = result.prepared.off_support_mask(result.grid)[labels]
    return float((evidence * outside).sum() / evidence.sum())


# --- Reproducibility -------------------------------------------------------------------------


def test_the_same_configuration_gives_the_same_run(
    trained: TrialResult, tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    torch.manual_seed(12345)  # The state before the run must not matter.
    _assert_same_run(fit(tiny_config, prepared=tiny_prepared), trained)


def test_another_seed_gives_another_run(
    trained: TrialResult, tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    other = fit(replace(tiny_config, seed=1, epochs=1), prepared=tiny_prepared)
    assert other.history[0]["loss"] != trained.history[0]["loss"]


def test_the_global_random_state_is_left_as_it_was(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    before = torch.get_rng_state()
    fit(replace(tiny_config, epochs=1), prepared=tiny_prepared)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_random_state_is_left_as_it_was_by_a_run_that_fails(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    before = torch.get_rng_state()

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny_config, prepared=tiny_prepared, on_step=interrupt)
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_are_not_written_to(tiny_prepared: PreparedData, tiny_config: TrialConfig) -> None:
    before = [
        s.images.copy() for s in (tiny_prepared.dataset.train, tiny_prepared.dataset.validation)
    ]
    prototypes = tiny_prepared.train_prototypes.clone()
    fit(replace(tiny_config, epochs=1), prepared=tiny_prepared)
    assert (before[0] == tiny_prepared.dataset.train.images).all()
    assert (before[1] == tiny_prepared.dataset.validation.images).all()
    assert torch.equal(tiny_prepared.train_prototypes, prototypes)


# --- Resumption ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "schedule": "one_cycle"},
        {"optimizer": "sgd", "schedule": "constant", "learning_rate": 0.01, "lambda_proto": 0.1},
        {"precision": "bf16"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_a_run_resumed_after_any_epoch_is_the_run_uninterrupted(
    tmp_path: Path, tiny_prepared: PreparedData, tiny_config: TrialConfig, changes: dict[str, Any]
) -> None:
    config = replace(tiny_config, **changes)
    whole = fit(config, _save_each(tmp_path), prepared=tiny_prepared)
    for epoch in range(1, config.epochs + 1):
        resumed = fit(config, prepared=tiny_prepared, state=tmp_path / f"{epoch}.pt")
        _assert_same_run(resumed, whole)
        assert torch.equal(resumed.evaluation.maps_PRR, whole.evaluation.maps_PRR)


def test_dropout_goes_on_where_it_was_cut(tmp_path: Path, tiny_prepared: PreparedData) -> None:
    # This backbone has dropout by default, so a run depends on the random state as well.
    config = TrialConfig(
        backbone="ghostnet_050", resolution=64, epochs=2, batch_size=100, device="cpu"
    )
    # Skip the SSIM ceiling, which takes longer than the run and is not tested here.
    prepared = replace(tiny_prepared)
    prepared._ceilings[64, (2, 2)] = torch.ones(10)
    whole = fit(config, _save_each(tmp_path), prepared=prepared)
    _assert_same_run(fit(config, prepared=prepared, state=tmp_path / "1.pt"), whole)


def test_every_epoch_of_every_seed_has_an_order_of_its_own(
    tiny_prepared: PreparedData, tiny_config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = set()
    for seed in (0, 1):
        trainer = Trainer(replace(tiny_config, seed=seed), tiny_prepared, torch.device("cpu"))
        seen: list[int] = []

        def record(chosen_N: Tensor, trainer: Trainer = trainer, seen: list[int] = seen) -> Tensor:
            seen.extend(chosen_N.tolist())
            return torch.zeros(len(trainer.step.loss_names))

        monkeypatch.setattr(trainer, "gradients", record)
        monkeypatch.setattr(trainer.step, "advance", lambda: None)
        for epoch in range(3):
            seen.clear()
            trainer.epoch = epoch
            trainer._train_epoch(None)
            assert sorted(seen) == list(range(len(tiny_prepared.dataset.train)))
            orders.add(tuple(seen))
    assert len(orders) == 6


def test_a_run_killed_within_an_epoch_goes_on_from_the_last_one(
    tmp_path: Path, trained: TrialResult, tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    steps = 0

    def interrupt(_: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == total + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny_config, _save_each(tmp_path), prepared=tiny_prepared, on_step=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["1.pt"]
    resumed = fit(tiny_config, prepared=tiny_prepared, state=tmp_path / "1.pt")
    _assert_same_run(resumed, trained)


def test_on_epoch_ends_the_run_by_returning_true(
    tiny_prepared: PreparedData, tiny_config: TrialConfig, trained: TrialResult
) -> None:
    result = fit(tiny_config, lambda report: report.epoch == 2, prepared=tiny_prepared)
    assert _untimed(result.history) == _untimed(trained.history)[:2]


def test_a_report_carries_the_evaluation_and_its_prototypes(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    reports: list[EpochReport] = []
    fit(replace(tiny_config, epochs=2), reports.append, prepared=tiny_prepared)
    assert [report.epoch for report in reports] == [1, 2]
    for report in reports:
        assert report.metrics["cam_ssim"] == report.evaluation.cam_ssim
        assert torch.equal(report.prototypes_PRR, tiny_prepared.prototypes("validation", 14))


@pytest.fixture(scope="module")
def saved_state(
    tmp_path_factory: pytest.TempPathFactory, tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> Path:
    """Return the state saved after the first of three epochs."""
    folder = tmp_path_factory.mktemp("state")

    def save(report: EpochReport) -> bool:
        report.save_state(folder / "state.pt")
        return True

    fit(tiny_config, save, prepared=tiny_prepared)
    return folder / "state.pt"


def test_a_saved_run_is_restored_without_training(
    saved_state: Path, tiny_prepared: PreparedData, tiny_config: TrialConfig, trained: TrialResult
) -> None:
    before = torch.get_rng_state()
    restored = restore(tiny_config, saved_state, prepared=tiny_prepared)
    assert _untimed(restored.history) == _untimed(trained.history)[:1]
    assert restored.evaluation.cam_ssim == trained.history[0]["cam_ssim"]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_is_written_whole_and_leaves_nothing_beside_it(saved_state: Path) -> None:
    assert [path.name for path in saved_state.parent.iterdir()] == ["state.pt"]


def test_a_state_holds_no_code(saved_state: Path) -> None:
    state = torch.load(saved_state, weights_only=True)
    assert state["epoch"] == 1
    assert load_state(saved_state)["history"] == state["history"]


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("lambda_batch", 0.3, "lambda_batch=0.2, not 0.3"),
        ("epochs", 5, "epochs=3, not 5"),
        ("seed", 7, "seed=0, not 7"),
    ],
)
def test_the_state_of_another_configuration_is_refused_by_field(
    saved_state: Path,
    tiny_prepared: PreparedData,
    tiny_config: TrialConfig,
    field: str,
    value: float,
    shown: str,
) -> None:
    config = replace(tiny_config, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"was saved with {shown}; resume with the same"):
        fit(config, prepared=tiny_prepared, state=saved_state)


def test_a_run_may_go_on_without_recording(
    saved_state: Path, tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    """A step that cannot be recorded ends in an error with this remedy."""
    config = replace(tiny_config, cuda_graphs=False)
    assert fit(config, prepared=tiny_prepared, state=saved_state).metrics["epoch"] == 3


def test_a_state_from_before_a_field_was_there_had_its_default(
    tiny_prepared: PreparedData, tiny_config: TrialConfig, tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    fit(
        replace(tiny_config, epochs=1),
        lambda report: report.save_state(path),
        prepared=tiny_prepared,
    )
    state = torch.load(path, weights_only=True)
    del state["config"]["lambda_energy"]
    torch.save(state, path)
    assert (
        fit(replace(tiny_config, epochs=1), prepared=tiny_prepared, state=path).metrics["epoch"]
        == 1
    )


def test_a_state_of_before_there_were_formats_is_read(saved_state: Path, tmp_path: Path) -> None:
    state = torch.load(saved_state, weights_only=True)
    assert state.pop("format") == STATE_FORMAT
    torch.save(state, tmp_path / "state.pt")
    assert load_state(tmp_path / "state.pt")["history"] == state["history"]


def test_a_newer_state_is_refused_with_the_remedy(saved_state: Path, tmp_path: Path) -> None:
    state = torch.load(saved_state, weights_only=True) | {"format": STATE_FORMAT + 1}
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(FormatError, match=r"state\.pt has the format 2, .* up to 1; upgrade"):
        load_state(tmp_path / "state.pt")


def test_a_state_may_move_to_another_device_and_data_folder(
    saved_state: Path, tiny_prepared: PreparedData, tiny_config: TrialConfig, trained: TrialResult
) -> None:
    config = replace(tiny_config, data_root="elsewhere")
    _assert_same_run(fit(config, prepared=tiny_prepared, state=saved_state), trained)


@pytest.mark.parametrize("damage", ["cut", "text", "other", "gone", "folder"])
def test_a_damaged_state_is_refused(
    tmp_path: Path,
    saved_state: Path,
    tiny_prepared: PreparedData,
    tiny_config: TrialConfig,
    damage: str,
) -> None:
    path = tmp_path / "state.pt"
    if damage == "cut":
        path.write_bytes(saved_state.read_bytes()[:1000])
    elif damage == "text":
        path.write_text("no state")
    elif damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "folder":
        path.mkdir()
    message = rf"{path} (cannot be read as a|is not a) saved state.*again"
    with pytest.raises(ConfigError, match=message):
        fit(tiny_config, prepared=tiny_prepared, state=path)


def test_a_state_that_would_run_code_is_refused(
    tmp_path: Path, tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return (shutil.copy, (__file__, str(tmp_path / "ran")))

    torch.save({"optimizer": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match="cannot be read as a saved state"):
        fit(tiny_config, prepared=tiny_prepared, state=tmp_path / "state.pt")
    assert not (tmp_path / "ran").exists()


# --- Validation ------------------------------------------------------------------------------


def test_validation_moves_no_weight_and_no_statistic(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    trainer = Trainer(tiny_config, tiny_prepared, torch.device("cpu"))
    trainer.run_epoch(None)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    trainer.validate()
    assert any("running_mean" in name for name in before)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is gradients[name]


def test_validation_data_has_no_influence_on_the_weights(
    trained: TrialResult, tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    data = replace(tiny_prepared.dataset, validation=tiny_prepared.dataset.test)
    prepared = PreparedData(data, tiny_prepared.train_prototypes, tiny_prepared.train_prototypes)
    other = fit(tiny_config, prepared=prepared)
    weights = trained.model.state_dict()
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


# --- Errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0.0, 1.0])
def test_a_run_that_diverges_says_so(
    tiny_prepared: PreparedData, tiny_config: TrialConfig, batch: float
) -> None:
    config = replace(
        tiny_config, optimizer="sgd", schedule="constant", learning_rate=1e30, lambda_batch=batch
    )
    with pytest.raises(DivergedError, match=r"diverged in epoch 1 \(loss nan.*lower learning_rate"):
        fit(config, prepared=tiny_prepared)


def test_a_run_whose_last_step_diverges_says_so(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    # The run has one step. Its loss is finite, the weights after it are not.
    config = replace(
        tiny_config,
        epochs=1,
        batch_size=1000,
        optimizer="sgd",
        schedule="constant",
        learning_rate=1e30,
    )
    with pytest.raises(DivergedError, match=r"diverged in epoch 1 \(cam_ssim nan\)"):
        fit(config, prepared=tiny_prepared)


def test_fp16_is_refused_on_the_cpu(tiny_prepared: PreparedData, tiny_config: TrialConfig) -> None:
    with pytest.raises(ConfigError, match="precision='fp16' needs CUDA, not cpu"):
        fit(replace(tiny_config, precision="fp16"), prepared=tiny_prepared)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    with pytest.raises(ConfigError, match="device='cuda' is not available"):
        fit(replace(tiny_config, device="cuda"), prepared=tiny_prepared)


def test_a_backbone_that_cannot_be_explained_is_refused_before_training(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    config = replace(tiny_config, backbone="resnet18", output_stride=32)
    with pytest.raises(BackboneError, match="14x14 pixels to a CAM grid of 1x1"):
        fit(config, prepared=tiny_prepared)


# --- Precision and compilation ---------------------------------------------------------------


def test_a_run_in_bf16_learns_too(
    tiny_prepared: PreparedData, tiny_config: TrialConfig, trained: TrialResult
) -> None:
    result = fit(replace(tiny_config, precision="bf16"), prepared=tiny_prepared)
    assert result.metrics["val_accuracy"] > 0.5
    assert next(result.model.parameters()).dtype == torch.float32
    first = result.history[0]["loss"]
    assert first != trained.history[0]["loss"]
    assert first == pytest.approx(trained.history[0]["loss"], rel=0.1)


@pytest.fixture(
    params=[
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.faults,
                pytest.mark.skipif(
                    shutil.which("g++") is None and shutil.which("clang++") is None,
                    reason="torch.compile needs a C++ compiler on the CPU",
                ),
            ],
        ),
    ]
)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set the default backend of `torch.compile`, which is inductor without this fixture."""
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend(request.param)
    torch.compiler.reset()
    yield
    torch.compiler.set_default_backend(before)
    torch.compiler.reset()


@pytest.mark.usefixtures("_backend")
def test_a_compiled_run_has_the_losses_of_an_eager_one(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    # Adam would turn gradients that are rounding errors into full steps.
    lambdas = {"lambda_proto": 0.1, "lambda_exchange": 0.1}
    config = replace(tiny_config, epochs=1, batch_size=50, optimizer="sgd", **lambdas)  # type: ignore[arg-type]
    eager = fit(config, prepared=tiny_prepared)
    compiled = fit(replace(config, compile=True), prepared=tiny_prepared)
    for name in ("loss", "loss_class", "loss_proto", "loss_batch", "loss_exchange", "cam_ssim"):
        assert compiled.metrics[name] == pytest.approx(eager.metrics[name], rel=1e-3), name
    assert set(compiled.model.state_dict()) == set(eager.model.state_dict())


def test_images_reach_the_trainer_without_a_copy(tiny_prepared: PreparedData) -> None:
    images, _ = to_device(tiny_prepared.dataset.train, torch.device("cpu"))
    assert images.data_ptr() == tiny_prepared.dataset.train.images.ctypes.data


def test_a_restored_run_names_the_threads_of_its_training(
    tmp_path: Path, tiny_config: TrialConfig, tiny_prepared: PreparedData
) -> None:
    config, state = replace(tiny_config, device="cpu", epochs=1), tmp_path / "state.pt"
    torch.set_num_threads(2)
    fit(config, lambda report: report.save_state(state), prepared=tiny_prepared)
    torch.set_num_threads(1)
    assert restore(config, state, prepared=tiny_prepared).hardware == Hardware("cpu", 2)
