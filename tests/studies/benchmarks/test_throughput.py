"""Check how throughput, start-up and time to a target are measured; speed itself is not tested."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.models import create_model
from batchcam.models.depthwise import DepthwiseConv2d
from studies.baselines import plain
from studies.benchmarks import startup, throughput, time_to_target
from studies.benchmarks.startup import Startup
from studies.benchmarks.throughput import TARGETS, Throughput, table
from studies.benchmarks.time_to_target import TimeToTarget


def test_plain_script_sees_the_pictures_as_the_trainer_does(prepared: PreparedData) -> None:
    split, mean, std = prepared.dataset.train, prepared.dataset.mean[0], prepared.dataset.std[0]
    batches = plain.loader(split, mean, std, 64, shuffle=False, workers=0)
    images = torch.cat([batch for batch, _ in batches])
    labels = torch.cat([batch for _, batch in batches])
    expected = (torch.from_numpy(split.images).float() / 255 - mean) / std
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == split.labels.tolist()


def test_plain_model_computes_the_same_with_pytorchs_own_convolutions() -> None:
    model = create_model("convnextv2_atto", in_chans=1, output_stride=8).eval()
    images = torch.randn(2, 1, 28, 28)
    expected = model(images)
    ours = plain.plain_model(model)
    assert not any(type(module) is DepthwiseConv2d for module in ours.modules())
    torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-4)


def test_plain_script_learns(prepared: PreparedData) -> None:
    data = prepared.dataset
    torch.manual_seed(0)
    model = plain.plain_model(create_model("simple_cnn", data.num_classes, data.channels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    batches = plain.loader(data.train, data.mean[0], data.std[0], 32, shuffle=True, workers=0)
    config = TrialConfig(lambda_proto=0.1, lambda_batch=0.1)
    loss = plain.loss_function(config, prepared.prototypes("train", 8))
    losses = [plain.train_epoch(model, batches, optimizer, schedule, loss) for _ in range(4)]
    assert losses[-1] < losses[0] / 2
    assert plain.accuracy(model, batches) > 0.8


def test_the_workers_of_a_measurement_take_time(prepared: PreparedData) -> None:
    threads = torch.get_num_threads()
    config = TrialConfig(batch_size=16, resolution=8, device="cpu")
    try:
        functions = throughput.create_untuned(config, prepared, 2, 1, with_plain=True)
        assert sorted(functions) == ["plain", "untuned"]
        for run in functions.values():
            seconds = run()
            assert isinstance(seconds, float)
            assert seconds > 0
    finally:
        torch.set_num_threads(threads)


def test_a_plain_script_reports_what_the_trainer_reports() -> None:
    settings = TimeToTarget(out=Path(), dataset="digits", epochs=1, threads=1, accuracy=0.1, ssim=0)
    prepared = prepare(settings.config())
    few = prepared.with_splits(train=prepared.dataset.train.take(np.arange(256)))
    outcomes = [
        time_to_target.by_plain_script(settings, few),
        time_to_target.by_trainer(settings, few),
    ]
    for outcome in outcomes:
        assert outcome["reached"]
        (epoch,) = outcome["epochs"]
        assert set(epoch) == {"val_accuracy", "cam_ssim", "seconds"}


@pytest.mark.faults
def test_throughput_is_measured_in_pairs_and_replaced_when_measured_again(tmp_path: Path) -> None:
    settings = Throughput(
        out=tmp_path,
        backbones=("simple_cnn",),
        precisions=("fp32",),
        batch_size=8,
        steps=2,
        rounds=2,
        threads=1,
    )
    for _ in range(2):
        throughput.main(settings)
    (entry,) = json.loads((tmp_path / "throughput.json").read_text())
    assert set(entry["ratios"]) == set(TARGETS)
    assert entry["images_per_second"]["epoch"] < entry["images_per_second"]["training"]
    for median, low, high in entry["ratios"].values():
        assert 0 < low <= median <= high
    text = (tmp_path / "throughput.md").read_text()
    assert text.splitlines() == table([entry])
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_start_up_ends_with_the_first_step(tmp_path: Path) -> None:
    startup.main(Startup(out=tmp_path, backbones=("simple_cnn",), repeats=1))
    seconds = json.loads((tmp_path / "startup.json").read_text())["seconds"]["simple_cnn"]
    assert 0 <= seconds["reused"]["median"] < seconds["process"]["median"]


@pytest.mark.faults
def test_time_to_a_target_stops_where_it_is_reached(
    prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resized(_: object) -> PreparedData:
        """Return digits in the size of MNIST's images, because MNIST's files may be missing."""

        def larger(images: np.ndarray) -> np.ndarray:
            return np.kron(images, np.ones((1, 1, 4, 4), dtype=np.uint8))[:, :, 2:30, 2:30]

        data = prepared.dataset
        splits = {
            name: replace(getattr(data, name), images=larger(getattr(data, name).images))
            for name in ("train", "validation")
        }
        return replace(prepared, dataset=replace(data, **splits))

    monkeypatch.setattr(time_to_target, "prepare", resized)
    settings = TimeToTarget(
        out=tmp_path, accuracy=0.3, ssim=-1.0, epochs=4, batch_size=32, precision="fp32", threads=1
    )
    time_to_target.main(settings)
    time_to_target.main(replace(settings, accuracy=1.01, epochs=1))
    easy, impossible = json.loads((tmp_path / "time_to_target.json").read_text())
    for run in ("trainer", "plain"):
        assert easy[run]["reached"]
        assert easy[run]["epochs"][-1]["val_accuracy"] >= 0.3
        assert all(epoch["val_accuracy"] < 0.3 for epoch in easy[run]["epochs"][:-1])
        assert not impossible[run]["reached"]
    assert easy["ratio"] == pytest.approx(
        easy["plain"]["seconds"] / easy["trainer"]["seconds"], rel=0.2
    )
    assert "ratio" not in impossible
