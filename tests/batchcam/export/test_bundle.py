"""Tests of bundles: saving and loading without a pickle, damaged bundles, output folders."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

import batchcam
from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import to_device
from batchcam.errors import BundleError, ConfigError, FormatError
from batchcam.export import bundle
from batchcam.export.bundle import FILES, FORMAT, PROTOTYPES, check_writable, load, save_bundle
from batchcam.similarity import ssim
from batchcam.training.fit import TrialResult, fit


@pytest.fixture
def copied(bundle_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the bundle, for a test that damages it."""
    return Path(shutil.copytree(bundle_dir, tmp_path / "copy"))


# --- The round trip --------------------------------------------------------------------------


def test_a_bundle_is_its_files(bundle_dir: Path) -> None:
    assert {path.name for path in bundle_dir.iterdir()} == set(FILES)
    assert all(path.stat().st_size > 0 for path in bundle_dir.iterdir())


def test_a_loaded_model_predicts_and_explains_as_the_trained_one(
    bundle_dir: Path, trained: TrialResult
) -> None:
    model = batchcam.load(bundle_dir)
    images, _ = to_device(trained.prepared.dataset.test, torch.device("cpu"))
    probabilities, maps = trained.evaluator.explain(images)
    assert np.array_equal(model.predict(images), probabilities.argmax(dim=1).numpy())
    assert np.array_equal(model.probabilities(images), probabilities.numpy())
    assert np.array_equal(model.explain(images), maps.numpy())
    assert not model.model.training
    assert model.class_names == tuple("0123456789")
    assert model.config == trained.config
    for name, value in trained.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value)


def test_a_bundle_has_the_prototypes_and_finds_the_nearest(
    bundle_dir: Path, trained: TrialResult
) -> None:
    model = load(bundle_dir)
    assert model.prototypes is not None
    names, prototypes = model.prototypes
    expected = trained.prepared.prototypes("train", trained.config.resolution)
    assert names == trained.prepared.prototype_names
    assert torch.allclose(prototypes, expected, atol=0.51 / 255)
    # Each prototype is nearest to itself. The similarity of a CAM is that to its nearest prototype.
    which, similarity = model.nearest_prototypes(prototypes.numpy())
    assert which.tolist() == list(range(10))
    assert similarity == pytest.approx(np.ones(10), abs=1e-5)
    maps = model.explain(trained.prepared.dataset.test.images[:5])
    which, similarity = model.nearest_prototypes(maps)
    cams = torch.from_numpy(maps)
    of_all = torch.stack([ssim(cams, each.expand_as(cams)) for each in prototypes])
    assert which.tolist() == of_all.argmax(dim=0).tolist()
    assert similarity == pytest.approx(of_all.amax(dim=0).numpy())


def test_what_was_taken_for_what_is_that_of_the_evaluation(
    bundle_dir: Path, trained: TrialResult
) -> None:
    metrics = load(bundle_dir).metrics
    confusion = trained.evaluation.confusion_CC
    wrong = sum(sum(taken.values()) for taken in metrics["val_errors"].values())
    images = metrics["val_images_per_class"]
    assert sum(images.values()) == int(confusion.sum())
    assert 1 - wrong / sum(images.values()) == pytest.approx(metrics["val_accuracy"])
    for name, taken in metrics["val_errors"].items():
        assert name not in taken
        assert list(taken.values()) == sorted(taken.values(), reverse=True)
        for other, count in taken.items():
            assert confusion[int(name), int(other)] == count > 0


def test_images_may_be_arrays_lists_or_tensors_with_or_without_a_channel(
    bundle_dir: Path, trained: TrialResult
) -> None:
    model = load(bundle_dir)
    images = trained.prepared.dataset.test.images[:4]
    expected = model.predict(images)
    assert expected.dtype == np.int64
    for same in (images[:, 0], torch.tensor(images), list(images[:, 0])):
        assert np.array_equal(model.predict(same), expected)


def test_images_of_another_size_are_resized(bundle_dir: Path) -> None:
    model = load(bundle_dir)
    assert model.explain(np.zeros((2, 40, 30), np.uint8)).shape == (2, 14, 14)


def test_a_model_explains_in_inference_mode_too(bundle_dir: Path) -> None:
    model = load(bundle_dir)
    images = np.random.default_rng(0).integers(0, 256, (2, 14, 14), dtype=np.uint8)
    with torch.inference_mode():
        inside = model.explain(torch.from_numpy(images))
    np.testing.assert_array_equal(inside, model.explain(images))


def test_no_images_give_no_predictions(bundle_dir: Path) -> None:
    model = load(bundle_dir)
    empty = np.zeros((0, 8, 8), np.uint8)
    assert model.predict(empty).shape == (0,)
    assert model.explain(empty).shape == (0, 14, 14)


def test_maps_explain_the_class_asked_for(bundle_dir: Path, trained: TrialResult) -> None:
    model = load(bundle_dir)
    images = trained.prepared.dataset.test.images[:5]
    predicted = model.predict(images)
    assert np.array_equal(model.explain(images, predicted), model.explain(images))
    other = model.explain(images, (predicted + 1) % 10)
    assert not np.array_equal(other, model.explain(images))
    assert other.min() >= 0
    assert other.max() <= 1


def test_a_loaded_model_evaluates_as_the_trained_one(
    bundle_dir: Path, trained: TrialResult
) -> None:
    split = trained.prepared.split("test", 14)
    found = load(bundle_dir).to("cpu").evaluate(split)
    expected = trained.evaluator.evaluate(split)
    assert found.cam_ssim == expected.cam_ssim
    assert found.accuracy == load(bundle_dir).metrics["test_accuracy"]


def test_metrics_say_what_was_measured_and_how_to_make_it_again(
    bundle_dir: Path, trained: TrialResult
) -> None:
    metrics = json.loads((bundle_dir / "metrics.json").read_text())
    last = trained.metrics
    for name in ("val_accuracy", "cam_ssim", "cam_ssim_ceiling", "images_per_second"):
        assert metrics[name] == last[name]
    assert 0.5 < metrics["test_accuracy"] <= 1
    assert metrics["parameters"] == sum(p.numel() for p in trained.model.parameters())
    assert metrics["epochs"] == 3
    assert metrics["seconds"] == pytest.approx(sum(e["seconds"] for e in trained.history))
    assert metrics["seed"] == 0
    assert metrics["dataset_sha256"] == trained.prepared.dataset.sha256
    commit = metrics["git_commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(\+dirty)?", commit)
    assert {"python", "torch", "timm", "numpy", "batchcam"} <= set(metrics["versions"])
    assert metrics["command"] == "batchcam train --out tiny"
    assert metrics["grid"] == [7, 7]
    assert list(metrics["cam_ssim_per_class"]) == list("0123456789")
    assert metrics["history"] == trained.history


def test_the_configuration_in_a_bundle_is_the_one_trained_with(
    bundle_dir: Path, trained: TrialResult
) -> None:
    assert TrialConfig.from_yaml(bundle_dir / "config.yaml") == trained.config


def test_the_model_card_is_read_by_model_hubs(bundle_dir: Path) -> None:
    card = ModelCard.load(bundle_dir / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    metrics = json.loads((bundle_dir / "metrics.json").read_text())
    results = {each.metric_type: each for each in card.data.eval_results}
    assert results["accuracy"].metric_value == metrics["test_accuracy"]
    assert results["ssim"].metric_value == metrics["test_cam_ssim"]
    assert results["accuracy"].dataset_split == "test"


def test_front_matter_is_that_of_earlier_versions(bundle_dir: Path) -> None:
    _, front_matter, _ = (bundle_dir / "README.md").read_text().split("---\n", 2)
    metrics = json.loads((bundle_dir / "metrics.json").read_text())
    accuracy = {"type": "accuracy", "value": metrics["test_accuracy"]}
    ssim = {"type": "ssim", "name": "CAM-prototype SSIM", "value": metrics["test_cam_ssim"]}
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": "digits", "type": "digits", "split": "test"},
        "metrics": [accuracy, ssim],
    }
    assert yaml.safe_load(front_matter) == {
        "library_name": "batchcam",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "explainable-ai", "grad-cam", "batch-cam"],
        "datasets": ["digits"],
        "metrics": ["accuracy"],
        "model-index": [{"name": "simple_cnn on digits, BCPL 0.2 (L1)", "results": [result]}],
    }


def test_the_model_card_tells_numbers_and_the_command(bundle_dir: Path) -> None:
    card = (bundle_dir / "README.md").read_text()
    metrics = json.loads((bundle_dir / "metrics.json").read_text())
    assert "# simple_cnn on digits, BCPL 0.2 (L1)" in card
    assert f"{metrics['test_accuracy']:.4f}" in card
    assert "batchcam train --out tiny" in card
    assert "Training was ended" not in card


@pytest.fixture(scope="module")
def stopped_resnet(trained: TrialResult) -> TrialResult:
    """Return a run of a dilated backbone, stopped after one of two epochs."""
    config = replace(
        trained.config, backbone="resnet10t", resolution=28, epochs=2, learning_rate=1e-3
    )
    return fit(config, lambda report: report.epoch == 1, prepared=trained.prepared)


def test_a_dilated_timm_model_comes_back_with_its_grid(
    tmp_path: Path, stopped_resnet: TrialResult
) -> None:
    # The configuration gives no output stride, so it was chosen for the resolution.
    metrics = save_bundle(tmp_path / "b", stopped_resnet, extra_metrics={"rung": 3})
    model = load(tmp_path / "b")
    images = stopped_resnet.prepared.dataset.test.images
    assert metrics["grid"] == [4, 4]
    assert model.model.features(torch.zeros(1, 1, 28, 28)).shape[2:] == (4, 4)
    assert metrics["rung"] == model.metrics["rung"] == 3
    accuracy = (model.predict(images) == stopped_resnet.prepared.dataset.test.labels).mean()
    assert metrics["test_accuracy"] == pytest.approx(accuracy)
    assert "ended after 1 of 2 epochs" in (tmp_path / "b" / "README.md").read_text()


# --- No pickle -------------------------------------------------------------------------------


def test_loading_reads_no_pickle_though_one_lies_there(
    copied: Path, trained: TrialResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str, str]]:
            return (shutil.copy, (__file__, str(copied / "ran")))

    for name in ("model.pt", "model.pkl", "pytorch_model.bin", "model.safetensors.pkl"):
        (copied / name).write_bytes(pickle.dumps(Evil()))

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert len(load(copied).predict(trained.prepared.dataset.test.images)) == 50
    assert not (copied / "ran").exists()


def test_weights_that_are_a_pickle_are_refused(copied: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, copied / "model.safetensors")
    with pytest.raises(BundleError, match=r"model\.safetensors does not hold the weights"):
        load(copied)


def test_a_bundle_of_a_timm_backbone_is_one_of_timms(
    tmp_path: Path, tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    config = replace(tiny_config, backbone="resnet10t", output_stride=8, epochs=1, resolution=28)
    result = fit(config, prepared=tiny_prepared)
    folder = tmp_path / "timm"
    save_bundle(folder, result, command="made here")
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = result.preprocess(torch.from_numpy(tiny_prepared.dataset.test.images))
    with torch.no_grad():
        expected = result.model(images)
        torch.testing.assert_close(theirs(images), expected)
        torch.testing.assert_close(load(folder).model(images), expected)
    assert theirs.pretrained_cfg["label_names"] == list(tiny_prepared.dataset.class_names)
    assert 'timm.create_model("local-dir:path/to/this/folder"' in (folder / "README.md").read_text()

    # Earlier versions stored the weights under their names in the whole model.
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = {n: w.contiguous() for n, w in result.model.state_dict().items()}
    save_file(weights, path, metadata)
    with torch.no_grad():
        torch.testing.assert_close(load(folder).model(images), expected)


# --- Damaged bundles -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES[:3])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(BundleError, match=f"is not a bundle: it lacks {name}"):
        load(copied)


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"lacks config\.yaml, model\.safetensors, metrics\.json"):
        load(tmp_path)


def test_figure_card_and_prototypes_are_not_needed(copied: Path) -> None:
    for name in ("cams.png", "README.md", PROTOTYPES):
        (copied / name).unlink()
    model = load(copied)
    assert model.channels == 1
    with pytest.raises(BundleError, match="has no prototypes"):
        model.nearest_prototypes(np.zeros((1, 14, 14), np.float32))


def test_damaged_prototypes_are_named(copied: Path) -> None:
    path = copied / PROTOTYPES
    save_file({"prototypes": torch.zeros(10, 3, 3)}, path, {"names": json.dumps(["a"] * 10)})
    with pytest.raises(BundleError, match=r"\(10, 3, 3\) pixels for 10 classes"):
        load(copied)
    path.write_bytes(b"no tensors")
    with pytest.raises(BundleError, match="does not hold class prototypes"):
        load(copied)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere is not a folder; give the folder of a bundle"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "text"])
def test_damaged_weights_are_refused(copied: Path, damage: str) -> None:
    path = copied / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-100],
            "header": content[:8] + b"}" * 50 + content[58:],
            "empty": b"",
            "text": b"these are not the weights",
        }[damage]
    )
    with pytest.raises(BundleError, match=rf"{path} does not hold the weights of the simple_cnn"):
        load(copied)


def test_weights_without_a_description_are_refused(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copied / "model.safetensors"
    save_file(load_file(path), path)
    with pytest.raises(BundleError, match=r"does not hold the weights.*'batchcam'"):
        load(copied)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("backbone: simple_cnn", "backbone: resnet10t", "weights of the resnet10t that config"),
        ("backbone: simple_cnn", "backbone: resnet81", "'resnet81' is unknown. Did you mean"),
    ],
)
def test_another_backbone_in_the_configuration_is_refused(
    copied: Path, before: str, after: str, message: str
) -> None:
    path = copied / "config.yaml"
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(BundleError, match=message):
        load(copied)


def test_an_unknown_field_suggests_the_nearest(copied: Path) -> None:
    path = copied / "config.yaml"
    path.write_text(path.read_text().replace("lambda_batch:", "lambda_bacth:"))
    with pytest.raises(ConfigError, match=r"'lambda_bacth' is not a field.*mean lambda_batch"):
        load(copied)


def test_bundle_carries_a_format_and_loads_without_one(copied: Path) -> None:
    path = copied / "metrics.json"
    metrics = json.loads(path.read_text())
    assert metrics.pop("format") == FORMAT
    path.write_text(json.dumps(metrics))
    assert load(copied).metrics == metrics


def test_newer_bundle_is_refused_with_the_remedy(copied: Path) -> None:
    path = copied / "metrics.json"
    path.write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(FormatError, match=r"metrics\.json has the format 2, .* up to 1; upgrade"):
        load(copied)


def test_metrics_that_are_no_object_are_refused(copied: Path) -> None:
    (copied / "metrics.json").write_text("[]")
    with pytest.raises(BundleError, match=r"metrics\.json is not a JSON object"):
        load(copied)


@pytest.mark.parametrize("content", [b"{", b"\xff\xff", b""])
def test_metrics_that_are_no_json_are_refused(copied: Path, content: bytes) -> None:
    (copied / "metrics.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"metrics\.json is not JSON"):
        load(copied)


# --- Invalid images and targets --------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8), np.float32), "images are torch.float32; give uint8 pixels"),
        (np.zeros((2, 8, 8), np.int64), "images are torch.int64; give uint8"),
        ([[1, 2], [3]], r"not an array of pixels"),
        (None, r"not an array of pixels"),
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\); expected \(N, 1, H, W\) or \(N, H, W\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"shape \(2, 3, 8, 8\); expected \(N, 1, H, W\)"),
        (np.zeros((2, 8, 8, 1), np.uint8), r"shape \(2, 8, 8, 1\); expected"),
        (np.zeros((1, 2, 1, 8, 8), np.uint8), r"shape \(1, 2, 1, 8, 8\); expected"),
    ],
)
def test_images_that_do_not_fit_are_refused(bundle_dir: Path, images: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load(bundle_dir).predict(images)


@pytest.mark.parametrize("targets", [[0], [0, 10], [-1, 0], [[0], [1]]])
def test_targets_that_do_not_fit_are_refused(bundle_dir: Path, targets: Any) -> None:
    with pytest.raises(BundleError, match="targets must be 2 class numbers from 0 to 9, one per"):
        load(bundle_dir).explain(np.zeros((2, 8, 8), np.uint8), targets)


# --- Output folders --------------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, trained: TrialResult) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    with pytest.raises(BundleError, match="out exists and is not empty; choose another folder"):
        save_bundle(tmp_path / "out", trained)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_an_empty_folder_is_taken(tmp_path: Path, trained: TrialResult) -> None:
    (tmp_path / "out").mkdir()
    save_bundle(tmp_path / "out", trained)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load(tmp_path / "out").channels == 1


def test_the_empty_working_directory_is_taken(
    tmp_path: Path, trained: TrialResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_bundle(Path(), trained)
    assert load(tmp_path / "here").channels == 1


def test_missing_parents_are_made(tmp_path: Path, trained: TrialResult) -> None:
    save_bundle(tmp_path / "a" / "b" / "c", trained)
    assert load(tmp_path / "a" / "b" / "c").channels == 1


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="file is a file; choose a folder"):
        check_writable(tmp_path / "file")


@pytest.mark.parametrize("below", ["out", "deeper/out"])
def test_a_file_as_a_parent_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"cannot be created: .*file.* is a file; choose another"):
        check_writable(tmp_path / "file" / below)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a /proc, closed even to root")
@pytest.mark.parametrize("path", ["/proc/out", "/proc/out/deeper"])
def test_a_folder_that_cannot_be_written_is_refused(path: str) -> None:
    with pytest.raises(BundleError, match=f"{path} cannot be written: .*; choose another folder"):
        check_writable(Path(path))


@pytest.mark.parametrize("step", ["_save_weights", "_draw_cams", "model_card"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_leaves_nothing(
    tmp_path: Path,
    trained: TrialResult,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: type[BaseException],
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error("the disk is full")

    monkeypatch.setattr(bundle, step, fail)
    with pytest.raises(error):
        save_bundle(tmp_path / "out", trained)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_can_be_read_by_others(bundle_dir: Path) -> None:
    assert bundle_dir.stat().st_mode & 0o055 == 0o055
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in bundle_dir.iterdir())
