"""Tests of the command line, called through `main` with a user's arguments."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from batchcam.cli import commands
from batchcam.cli.main import main
from batchcam.config import TrialConfig
from batchcam.export.bundle import FILES, load
from batchcam.training.fit import fit

QUICK = ("--resolution", "8", "--epochs", "1", "--device", "cpu")


def run(*arguments: str | Path) -> int:
    """Run the command and return its exit status."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail, and return its error without the prefix ``error: ``."""
    assert run(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    return shown.removeprefix("error: ")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of `batchcam train`. It is shared: a test that damages it works on a copy."""
    directory = tmp_path_factory.mktemp("cli") / "made"
    arguments = ("--lambda-batch", "0.3", "--metric", "l2", "--seed", "4")
    assert run("train", *QUICK, *arguments, "--out", directory) == 0
    return directory


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


def _edit_metrics(directory: Path, **changes: Any) -> None:
    path = directory / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- train -----------------------------------------------------------------------------------


def test_train_writes_a_bundle_with_the_flags_given(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == set(FILES)
    config = TrialConfig.from_yaml(made / "config.yaml")
    assert config == TrialConfig(
        resolution=8, epochs=1, device="cpu", lambda_batch=0.3, metric="l2", seed=4
    )
    assert [path.name for path in made.parent.iterdir()] == ["made"]


def test_train_shows_each_epoch_and_the_test_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", *QUICK, "--epochs", "2", "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "epoch   1/2" in shown
    assert "epoch   2/2" in shown
    assert f"bundle written to {tmp_path / 'out'}" in shown


def test_flags_override_the_configuration_given(made: Path, tmp_path: Path) -> None:
    config = made / "config.yaml"
    assert run("train", "--config", config, "--seed", "5", "--out", tmp_path / "out") == 0
    found = TrialConfig.from_yaml(tmp_path / "out" / "config.yaml")
    assert found.seed == 5
    assert found.as_dict() | {"seed": 4} == TrialConfig.from_yaml(config).as_dict()


def test_a_configuration_alone_trains_the_same_model(made: Path, tmp_path: Path) -> None:
    assert run("train", f"--config={made / 'config.yaml'}", "--out", tmp_path / "out") == 0
    one, other = load(made), load(tmp_path / "out")
    for name, value in one.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value), name


@pytest.fixture
def cut_after_two_epochs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Interrupt each run in its third epoch, until the returned function is called."""

    def cut(*args: Any, on_step: Callable[[int, int], None], **kwargs: Any) -> Any:
        steps = 0

        def step(done: int, total: int) -> None:
            nonlocal steps
            steps += 1
            if steps > 2 * total:
                raise KeyboardInterrupt
            on_step(done, total)

        return fit(*args, on_step=step, **kwargs)

    monkeypatch.setattr(commands, "fit", cut)
    return lambda: monkeypatch.setattr(commands, "fit", fit)


def test_a_run_that_was_cut_goes_on_with_resume(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cut_after_two_epochs: Callable[[], None],
) -> None:
    arguments = ("train", *QUICK, "--epochs", "3", "--out", tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        main([str(argument) for argument in arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["out.state.pt"]
    cut_after_two_epochs()

    # Without --resume, or with another configuration, the command refuses the saved state.
    assert "interrupted run; continue with --resume" in _refused(capsys, *arguments)
    other = _refused(capsys, *arguments, "--resume", "--seed", "9")
    assert "was saved with seed=0, not 9" in other

    assert run(*arguments, "--resume") == 0
    shown = capsys.readouterr().out
    assert "epoch   3/3" in shown
    assert "epoch   2/3" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    whole = tmp_path / "whole"
    assert run("train", *QUICK, "--epochs", "3", "--out", whole) == 0
    for name, value in load(whole).model.state_dict().items():
        assert torch.equal(load(tmp_path / "out").model.state_dict()[name], value), name


def test_resume_without_a_state_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _refused(capsys, "train", *QUICK, "--resume", "--out", tmp_path / "out")
    assert f"nothing to resume: {tmp_path / 'out.state.pt'} does not exist" in message


def test_the_working_directory_can_be_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("train", *QUICK, "--out", ".") == 0
    assert load(tmp_path / "here").channels == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lambda-batch", "-1"), "lambda_batch=-1.0 must be a finite number >= 0"),
        (("--resolution", "4"), "resolution=4 must be at least 8 pixels"),
        (("--backbone", "resnet81"), "backbone 'resnet81' is unknown. Did you mean"),
        (("--backbone", "densenet121"), "densenet121 fails on 8x8 pixels"),
        (("--dataset", "imagefolder"), "imagefolder needs --data-root"),
        (("--precision", "fp16"), "precision='fp16' needs CUDA"),
        (("--device", "cuda:77"), "device='cuda:77' is not available"),
        (("--config", "nowhere.yaml"), "nowhere.yaml cannot be read as YAML"),
        (("--learning-rate", "1e30", "--optimizer", "sgd"), "training diverged in epoch 1"),
    ],
)
def test_a_bad_value_is_one_line_of_error(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    shown = _refused(capsys, "train", *QUICK, *arguments, "--out", tmp_path / "out")
    assert message in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "choice"),
    [("--metric", "ssmi", "'ssim'"), ("--dataset", "cifar", "'fashion_mnist'")],
)
def test_an_unknown_choice_is_refused_with_the_choices(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, choice: str, tmp_path: Path
) -> None:
    assert run("train", flag, value, "--out", tmp_path / "out") == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"invalid choice '{value}' for argument '{flag}'" in shown
    assert choice in shown
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_before_training(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _refused(capsys, "train", *QUICK, "--out", made)
    assert "exists and is not empty" in message


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (("train", "--lamda-batch", "1", "--out", "x"), "--lambda-batch"),
        (("trian", "--out", "x"), "train"),
    ],
)
def test_an_unknown_word_suggests_the_nearest(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], near: str
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert near in captured.out + captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments", [("train", "--epochs", "many", "--out", "x"), ("train",), (), ("evaluate",)]
)
def test_a_malformed_command_exits_with_two(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


# --- evaluate --------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_finds_what_the_bundle_says(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    out = tmp_path / "out"
    assert run("evaluate", made, "--split", split, "--out", out) == 0
    metrics = load(made).metrics
    found = json.loads((out / "evaluation.json").read_text())
    accuracy = metrics["val_accuracy" if split == "validation" else "test_accuracy"]
    assert found["split"] == split
    assert found["accuracy"] == accuracy
    assert found["cam_ssim"] == metrics["cam_ssim" if split == "validation" else "test_cam_ssim"]
    assert found["cam_ssim_ceiling"] == pytest.approx(metrics["cam_ssim_ceiling"])
    confusion = np.array(found["confusion"])
    assert confusion.trace() / confusion.sum() == pytest.approx(accuracy)
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "cams.png", "errors.png"}
    assert f"{accuracy:.4f}" in capsys.readouterr().out


def test_evaluate_without_a_folder_writes_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", made) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "verify"])
def test_other_data_than_the_bundle_was_made_from_is_refused(
    copied: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    _edit_metrics(copied, dataset_sha256="0" * 64)
    message = _refused(capsys, command, copied)
    assert "the bundle was made from 0000000000000000…; give the original data set" in message


@pytest.mark.parametrize("command", ["evaluate", "verify", "explain"])
def test_a_folder_that_is_no_bundle_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = ("picture.png", "--out", tmp_path / "out") if command == "explain" else ()
    assert "is not a bundle: it lacks config.yaml" in _refused(capsys, command, tmp_path, *more)


# --- compare ---------------------------------------------------------------------------------


def test_compare_draws_a_row_for_each_bundle(
    made: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heights = []
    for number, bundles in enumerate([(made,), (made, copied)]):
        path = tmp_path / f"{number}.png"
        assert run("compare", *bundles, "--out", path) == 0
        with Image.open(path) as picture:
            heights.append(picture.height)
    assert heights[1] > heights[0]
    assert capsys.readouterr().out.count("simple_cnn on digits, BCPL 0.3 (L2)") == 3


def test_compare_needs_a_bundle_and_a_place_to_write(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no bundle was given" in _refused(capsys, "compare", "--out", tmp_path / "a.png")
    for out in (tmp_path, tmp_path / "nowhere" / "a.png"):
        message = _refused(capsys, "compare", made, "--out", out)
        assert "cannot be written; give a file in a folder that exists" in message


# --- explain ---------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Write three digits as picture files: grey and RGB, two with the same file name."""
    images = np.round(load_digits().images[:3] * (255 / 16)).astype(np.uint8)
    paths = [tmp_path / "a" / "zero.png", tmp_path / "b" / "zero.png", tmp_path / "a" / "two.png"]
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).convert("RGB" if path.stem == "two" else "L").save(path)
    return paths


def test_explain_classifies_pictures_and_draws_their_cams(
    made: Path, tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("explain", made, *pictures, "--out", out, "--device", "cpu") == 0
    records = json.loads((out / "predictions.json").read_text())
    assert [record["image"] for record in records] == [str(path) for path in pictures]
    assert [record["cam"] for record in records] == [
        "zero_cam.png",
        "zero_1_cam.png",
        "two_cam.png",
    ]
    images = np.round(load_digits().images[:3] * (255 / 16)).astype(np.uint8)
    model = load(made)
    expected = [model.class_names[label] for label in model.predict(images)]
    assert [record["class"] for record in records] == expected
    which, similarity = model.nearest_prototypes(model.explain(images))
    assert [int(record["nearest_prototype"]) for record in records] == which.tolist()
    assert [record["prototype_ssim"] for record in records] == pytest.approx(similarity.tolist())
    for record in records:
        assert 0 < record["probability"] <= 1
        with Image.open(out / record["cam"]) as picture:
            assert picture.format == "PNG"
    shown = capsys.readouterr().out
    assert all(str(path) in shown for path in pictures)


def test_explain_without_pictures_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _refused(capsys, "explain", made, "--out", tmp_path / "out")
    assert "no picture was given; name at least one file" in message


def test_explain_names_the_picture_that_cannot_be_read(
    made: Path, tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures[1].write_text("not a picture")
    message = _refused(capsys, "explain", made, *pictures, "--out", tmp_path / "out")
    assert f"{pictures[1]} cannot be read as a picture" in message
    assert not (tmp_path / "out").exists()


# --- verify ----------------------------------------------------------------------------------


def test_verify_passes_on_a_good_bundle(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", made, "--accuracy-tolerance", "0", "--ssim-tolerance", "0") == 0
    assert capsys.readouterr().out.endswith("verified\n")


@pytest.mark.parametrize(("name", "by"), [("val_accuracy", 0.006), ("cam_ssim", 0.021)])
def test_verify_fails_on_altered_metrics(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str, by: float
) -> None:
    was = load(copied).metrics[name]
    _edit_metrics(copied, **{name: was - by})
    assert run("verify", copied) == 1
    shown = capsys.readouterr().out
    assert f"{was:.4f} retrained: NOT within" in shown
    assert shown.endswith("NOT verified\n")


def test_verify_trains_with_the_threads_of_the_bundle(copied: Path) -> None:
    _edit_metrics(copied, threads=2)
    assert run("verify", copied, "--accuracy-tolerance", "1", "--ssim-tolerance", "2") == 0
    assert torch.get_num_threads() == 2


def test_verify_retrains_a_run_that_was_ended_early_for_as_long(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (copied / "config.yaml").read_text().replace("epochs: 1", "epochs: 50")
    (copied / "config.yaml").write_text(config)
    assert run("verify", copied, "--accuracy-tolerance", "1", "--ssim-tolerance", "2") == 0
    shown = capsys.readouterr().out
    assert "epoch   1/50" in shown
    assert "epoch   2/50" not in shown


# --- A user's own pictures, end to end -------------------------------------------------------


def test_pictures_are_trained_on_evaluated_and_verified_where_they_moved_to(
    tmp_path: Path, make_pictures: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_pictures(mode="RGB", count=8)
    bundle = tmp_path / "bundle"
    arguments = (*QUICK, "--dataset", "imagefolder", "--data-root", root)
    assert run("train", *arguments, "--out", bundle) == 0
    assert load(bundle).class_names == ("bright", "dark")
    moved = root.rename(tmp_path / "moved")
    assert "is not a folder" in _refused(capsys, "evaluate", bundle)
    assert run("evaluate", bundle, "--data-root", moved) == 0
    assert run("verify", bundle, "--data-root", moved) == 0


# --- The installed command -------------------------------------------------------------------


def test_the_installed_command_shows_its_help() -> None:
    command = Path(sys.executable).with_name("batchcam")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name in ("train", "evaluate", "compare", "explain", "verify"):
        assert name in done.stdout
    assert done.stderr == ""
