"""The subcommands of `batchcam`: a record of flags each, with a `run` that returns the exit status.

The flags of `train` are the fields of TrialConfig. Status 0 is success; `verify` returns 1 if the
metrics differ.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batchcam import figures
from batchcam.config import TrialConfig
from batchcam.data.image_folder import read_picture
from batchcam.data.prepared import PreparedData, prepare
from batchcam.errors import BundleError, ConfigError
from batchcam.export.bundle import check_writable, load, save_bundle
from batchcam.export.formats import export
from batchcam.export.loaded_model import LoadedModel
from batchcam.export.model_card import loss_name, title
from batchcam.training.fit import EpochReport, TrialResult, fit

console = Console(highlight=False, soft_wrap=True)
STATE_FILE = "state.pt"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model and write it as a bundle."""

    trial: Annotated[TrialConfig, tyro.conf.arg(name="")] = field(default_factory=TrialConfig)
    out: Path
    """Folder of the bundle; must not exist, or be empty."""
    config: Path | None = None
    """A config.yaml to start from; the other flags override it."""
    resume: bool = False
    """Resume an interrupted run with the same --out."""

    def run(self) -> int:
        """Train, save the state after each epoch beside the bundle's folder, write the bundle."""
        check_writable(self.out)
        out = self.out.resolve()  # "." has no name.
        state = out.with_name(f"{out.name}.{STATE_FILE}")
        if state.exists() and not self.resume:
            raise ConfigError(
                f"{state} is the state of an interrupted run; continue with --resume, or remove it."
            )
        if self.resume and not state.exists():
            raise ConfigError(
                f"there is nothing to resume: {state} does not exist; check --out, or leave out "
                "--resume to start a run."
            )

        def save_state(report: EpochReport) -> None:
            report.save_state(state)

        prepared = prepare(self.trial)
        resumed = state if self.resume else None
        result = _fit_with_progress(self.trial, prepared, save_state, resumed)
        metrics = save_bundle(self.out, result)
        state.unlink(missing_ok=True)
        console.print(f"test accuracy {metrics['test_accuracy']:.4f}; bundle written to {self.out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a bundle on a split, and draw its class CAMs and its errors."""

    bundle: tyro.conf.Positional[Path]
    split: Literal["validation", "test", "train"] = "test"
    out: Path | None = None
    """Folder for evaluation.json, cams.png and errors.png."""
    data_root: Path | None = None
    """Where the data set is, if it is not where it was in training."""
    device: str = "auto"

    def run(self) -> int:
        """Print accuracy and SSIM per class; with --out, write JSON and figures."""
        model = load(self.bundle).to(self.device)
        config = _with_data_root(model.config, self.data_root)
        prepared = prepare(config)
        _check_same_data(model, prepared.dataset.sha256)
        split = prepared.split(self.split, config.resolution, model.device)
        evaluation = model.evaluate(split)
        grid = model.metrics["grid"]
        ceiling = prepared.ceiling(config.resolution, (grid[0], grid[1]))

        console.print(f"{title(config)}, {self.split} split, {len(split)} images")
        console.print(f"accuracy          {evaluation.accuracy:.4f}")
        console.print(
            f"CAM-prototype SSIM {evaluation.cam_ssim:.4f} of {ceiling.mean():.4f} (class level), "
            f"{evaluation.cam_ssim_sample:.4f} (per image)"
        )
        for name, value, limit in zip(
            prepared.prototype_names, evaluation.cam_ssim_P.tolist(), ceiling.tolist(), strict=True
        ):
            console.print(f"  {name:<14}{value:8.4f} of {limit:.4f}")
        if self.out is None:
            return 0

        check_writable(self.out)
        self.out.mkdir(exist_ok=True)
        content = {
            "split": self.split,
            "accuracy": evaluation.accuracy,
            "cam_ssim": evaluation.cam_ssim,
            "cam_ssim_sample": evaluation.cam_ssim_sample,
            "cam_ssim_ceiling": ceiling.mean().item(),
            "cam_ssim_per_class": dict(
                zip(prepared.prototype_names, evaluation.cam_ssim_P.tolist(), strict=True)
            ),
            "confusion": evaluation.confusion_CC.tolist(),
        }
        (self.out / "evaluation.json").write_text(json.dumps(content, indent=2) + "\n")
        heading = f"{title(config)}, {self.split} split: accuracy {evaluation.accuracy:.2%}"
        figures.save(
            figures.class_cams(
                evaluation.maps_PRR,
                split.prototypes_PRR.cpu(),
                prepared.prototype_names,
                evaluation.cam_ssim_P,
                ceiling,
                heading,
            ),
            self.out / "cams.png",
        )
        wrong_maps, _ = model.error_maps(split.images_NCHW, split.labels_N)
        figures.save(
            figures.misclassified(
                wrong_maps,
                evaluation.maps_PRR[:: len(prepared.prototype_names) // len(model.class_names)],
                evaluation.confusion_CC,
                model.class_names,
                heading,
            ),
            self.out / "errors.png",
        )
        console.print(f"written to {self.out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Draw the class CAMs of several bundles in rows below the prototypes."""

    bundles: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    """PNG to write."""
    data_root: Path | None = None
    """Where the data set is, if it is not where it was in training."""

    def run(self) -> int:
        """Evaluate each bundle on the validation split, and draw a row of maps for each."""
        if not self.bundles:
            raise ConfigError("no bundle was given; name at least one folder.")
        if self.out.is_dir() or not self.out.parent.is_dir():
            raise ConfigError(f"{self.out} cannot be written; give a file in a folder that exists.")
        models = [load(bundle) for bundle in self.bundles]
        prepared = prepare(_with_data_root(models[0].config, self.data_root))
        names = prepared.prototype_names
        rows: list[figures.Row] = []
        for model in models:
            _check_same_data(model, prepared.dataset.sha256)
            split = prepared.split("validation", model.config.resolution, model.device)
            evaluation = model.evaluate(split)
            if not rows:
                rows.append(("prototype", split.prototypes_PRR, None))
            summary = f"{loss_name(model.config)}\n{evaluation.accuracy:.2%}"
            notes = [f"SSIM {value:.2f}" for value in evaluation.cam_ssim_P.tolist()]
            rows.append((summary, evaluation.maps_PRR, notes))
            console.print(
                f"{title(model.config)}: accuracy {evaluation.accuracy:.4f}, SSIM "
                f"{evaluation.cam_ssim:.3f} of {model.metrics['cam_ssim_ceiling']:.3f}"
            )
        heading = f"Class CAMs on {prepared.dataset.name}, validation split"
        figures.save(figures.class_rows(rows, names, heading), self.out)
        console.print(f"written to {self.out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Classify pictures, and draw the CAM of each decision with the most similar prototype.

    Check a picture whose CAM is most similar to the prototype of another class than the predicted.
    """

    bundle: tyro.conf.Positional[Path]
    images: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    """Folder for a <picture>_cam.png per picture, and predictions.json."""
    device: str = "auto"

    def run(self) -> int:
        """Print a line per picture, and write the overlays."""
        if not self.images:
            raise ConfigError("no picture was given; name at least one file.")
        model = load(self.bundle).to(self.device)
        side = model.preprocess.resolution
        pictures = torch.stack(
            [torch.from_numpy(read_picture(p, side, model.channels == 1)) for p in self.images]
        )
        check_writable(self.out)
        self.out.mkdir(exist_ok=True)
        probabilities, maps = model.probabilities(pictures), model.explain(pictures)
        nearest = None if model.prototypes is None else model.nearest_prototypes(maps)
        records = []
        for number, path in enumerate(self.images):
            label = int(probabilities[number].argmax())
            name, share = model.class_names[label], float(probabilities[number, label])
            drawing = self.out / f"{path.stem}_cam.png"
            if drawing.exists():  # Two pictures of one name, from two folders.
                drawing = self.out / f"{path.stem}_{number}_cam.png"
            record = {"image": str(path), "class": name, "probability": share, "cam": drawing.name}
            panel, message = None, ""
            if nearest is not None and model.prototypes is not None:
                which, similarity = int(nearest[0][number]), float(nearest[1][number])
                other = model.prototypes[0][which]
                record |= {"nearest_prototype": other, "prototype_ssim": similarity}
                panel = (
                    f"nearest prototype: {other}\nSSIM {similarity:.2f}",
                    model.prototypes[1][which],
                )
                message = f", its CAM nearest to the prototype of {other} (SSIM {similarity:.2f})"
            title_ = f"{name} ({share:.1%})"
            map_RR = torch.from_numpy(maps[number])
            figures.save(figures.overlay(pictures[number].numpy(), map_RR, title_, panel), drawing)
            records.append(record)
            console.print(f"{path}: {name} ({share:.1%}){message} -> {drawing}")
        (self.out / "predictions.json").write_text(
            json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Retrain a bundle from its config.yaml, and compare the metrics.

    It trains with as many PyTorch threads as the bundle was trained with, because on a CPU the
    rounding depends on their number.
    """

    bundle: tyro.conf.Positional[Path]
    accuracy_tolerance: float = 0.005
    """Largest difference of validation accuracy that passes, as a fraction of 1."""
    ssim_tolerance: float = 0.02
    """Largest difference of class-level CAM-prototype SSIM that passes."""
    data_root: Path | None = None
    """Where the data set is, if it is not where it was in training."""

    def run(self) -> int:
        """Retrain for the number of epochs of the bundle, and compare."""
        model = load(self.bundle)
        # Read again: unlike load, training must refuse a run with loss terms that the file lacks.
        trained = TrialConfig.from_yaml(self.bundle / "config.yaml")
        config = _with_data_root(trained, self.data_root)
        epochs = int(model.metrics["epochs"])

        def stop(report: EpochReport) -> bool:
            return report.epoch >= epochs

        prepared = prepare(config)
        _check_same_data(model, prepared.dataset.sha256)
        torch.set_num_threads(int(model.metrics.get("threads", torch.get_num_threads())))
        result = _fit_with_progress(config, prepared, stop)
        passed = True
        for name, tolerance in (
            ("val_accuracy", self.accuracy_tolerance),
            ("cam_ssim", self.ssim_tolerance),
        ):
            was, now = float(model.metrics[name]), result.metrics[name]
            within = abs(now - was) <= tolerance
            passed = passed and within
            console.print(
                f"{name:<14}{was:.4f} in the bundle, {now:.4f} retrained: "
                f"{'within' if within else 'NOT within'} {tolerance:g}"
            )
        console.print("verified" if passed else "NOT verified")
        return 0 if passed else 1


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a bundle's model in formats that do not need this project: timm's format, ONNX."""

    bundle: tyro.conf.Positional[Path]
    out: Path
    """Folder for config.json and model.safetensors, as timm reads them, and model.onnx."""

    def run(self) -> int:
        """Write the model in every format that it supports."""
        model = load(self.bundle)
        check_writable(self.out)
        self.out.mkdir(exist_ok=True)
        written = export(model, self.out)
        if not written:
            raise BundleError(
                f"{model.config.backbone} has no other format; load the bundle with batchcam."
            )
        console.print(f"{', '.join(written)} written to {self.out}")
        return 0


def _with_data_root(config: TrialConfig, data_root: Path | None) -> TrialConfig:
    return config if data_root is None else replace(config, data_root=str(data_root))


def _check_same_data(model: LoadedModel, sha256: str) -> None:
    expected = model.metrics["dataset_sha256"]
    if sha256 != expected:
        raise BundleError(
            f"the data set found has the SHA-256 {sha256[:16]}…, the bundle was made from "
            f"{expected[:16]}…; give the original data set with --data-root."
        )


def _fit_with_progress(
    config: TrialConfig,
    prepared: PreparedData,
    on_epoch: Callable[[EpochReport], bool | None],
    state: Path | None = None,
) -> TrialResult:
    """Train with a line per epoch, and on a terminal a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        bar = progress.add_task("preparing", total=None)

        def step(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        def epoch(report: EpochReport) -> bool | None:
            m = report.metrics
            summary = (
                f"accuracy {m['val_accuracy']:.4f}  SSIM {m['cam_ssim']:.3f} of "
                f"{m['cam_ssim_ceiling']:.3f}"
            )
            progress.console.print(
                f"epoch {report.epoch:>3}/{config.epochs}  loss {m['loss']:.4f}  {summary}  "
                f"{m['images_per_second']:,.0f} images/s"
            )
            progress.update(bar, description=summary, completed=0)
            return on_epoch(report)

        return fit(config, epoch, prepared=prepared, state=state, on_step=step)
