"""Bundles: folders that hold a trained model, and everything needed to reuse or retrain it.

    config.yaml         the TrialConfig
    model.safetensors   the weights, and how to build the model around them
    metrics.json        the metrics, with their provenance
    cams.png            each class's CAM beside its prototype
    README.md           the model card
    prototypes.safetensors   the class prototypes of the training images
    config.json         for timm backbones: timm's own description, with which timm loads the folder

No file is unpickled: loading a bundle runs no code from it.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from batchcam import figures
from batchcam.config import TrialConfig
from batchcam.data.preprocessing import Preprocess
from batchcam.errors import BundleError, check_format, first_line
from batchcam.export.loaded_model import LoadedModel
from batchcam.export.model_card import model_card, title
from batchcam.export.timm_format import CONFIG_FILE, load_weights, own_weights, write_config
from batchcam.models import TimmCNN, create_model, resolve_output_stride
from batchcam.provenance import command_line, git_commit, package_versions
from batchcam.training.fit import TrialResult

PROTOTYPES = "prototypes.safetensors"
FILES = ("config.yaml", "model.safetensors", "metrics.json", "cams.png", "README.md", PROTOTYPES)
FORMAT = 1
"""The newest format of a bundle that this version reads, and the one that it writes."""
_MODEL_KEY = "batchcam"
"""Key of the description of the model, as JSON, in the metadata of the weights."""
_NAMES_KEY = "names"
"""Key of the names of the prototypes, as JSON, in their metadata."""


def save_bundle(
    directory: Path,
    result: TrialResult,
    *,
    command: str | None = None,
    extra_metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a finished run as a bundle. Evaluates it on the test split, once.

    The folder appears complete or not at all.

    Args:
        directory: a folder that does not exist yet, or is empty.
        result: the run.
        command: the command that made the run; None: the command line of this process.
        extra_metrics: further entries of metrics.json.

    Returns:
        The content of metrics.json.

    Raises:
        BundleError: the folder exists and is not empty, or cannot be written.

    Example:
        >>> import tempfile
        >>> from batchcam import TrialConfig, fit, load, save_bundle
        >>> result = fit(TrialConfig(dataset="digits", resolution=14, epochs=1, device="cpu"))
        >>> folder = Path(tempfile.mkdtemp()) / "bundle"
        >>> metrics = save_bundle(folder, result)
        >>> images = result.prepared.dataset.test.images[:2]  # uint8 (N, 1, 8, 8)
        >>> load(folder).explain(images).shape
        (2, 14, 14)
    """
    check_writable(directory)
    directory = directory.resolve()  # "." has no name and cannot be renamed to.
    metrics = {
        "format": FORMAT,
        **_describe(result, command or command_line()),
        **(extra_metrics or {}),
    }
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        extra_terms = {spec.name: weight for spec, weight in result.extra_terms}
        result.config.to_yaml(staging / "config.yaml", extra_terms)
        _save_weights(staging / "model.safetensors", result)
        _save_timm_config(staging / CONFIG_FILE, result)
        _write_json(staging / "metrics.json", metrics)
        _save_prototypes(staging / PROTOTYPES, result)
        _draw_cams(staging / "cams.png", result)
        (staging / "README.md").write_text(model_card(result, metrics), encoding="utf-8")
        staging.chmod(0o755)
        for path in staging.glob("*.safetensors"):
            path.chmod(0o644)
        staging.replace(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return metrics


def check_writable(directory: Path) -> None:
    """Create the parents of a folder to be written; refuse a folder that cannot be written.

    Raises:
        BundleError: it is a file, it is not empty, or its parent is not writable.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.is_dir() and any(directory.iterdir()):
            raise BundleError(
                f"{directory} exists and is not empty; choose another folder or remove it."
            )
        if directory.exists() and not directory.is_dir():
            raise BundleError(f"{directory} is a file; choose a folder.")
        tempfile.TemporaryFile(dir=directory.parent).close()
    except (FileExistsError, NotADirectoryError) as error:
        raise BundleError(
            f"{directory} cannot be created: {error.filename} is a file; choose another folder."
        ) from error
    except OSError as error:
        raise BundleError(
            f"{directory} cannot be written: {error.strerror}; choose another folder or change its "
            "permissions."
        ) from error


def load(directory: str | Path) -> LoadedModel:
    """Load a bundle. Needs no data set and no network, and reads no pickle.

    Args:
        directory: the folder of the bundle.

    Raises:
        BundleError: a file is missing, damaged, or inconsistent with the others.
        ConfigError: config.yaml holds a bad field.
        FormatError: a newer version wrote the bundle.

    Example: see :func:`save_bundle`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a folder; give the folder of a bundle.")
    missing = [name for name in FILES[:3] if not (directory / name).is_file()]
    if missing:
        raise BundleError(
            f"{directory} is not a bundle: it lacks {', '.join(missing)}; give the folder of a "
            "bundle, or restore the files."
        )
    metrics = read_metrics(directory)
    config = TrialConfig.from_yaml(directory / "config.yaml", ignore_extra_terms=True)
    weights_path = directory / "model.safetensors"
    try:
        with safe_open(weights_path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[_MODEL_KEY])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = create_model(
            config.backbone,
            len(description["class_names"]),
            description["channels"],
            description["output_stride"],
        )
        load_weights(model, weights)
        return LoadedModel(
            config=config,
            metrics=metrics,
            class_names=tuple(description["class_names"]),
            model=model.eval(),
            preprocess=Preprocess(
                config.resolution, tuple(description["mean"]), tuple(description["std"])
            ),
            channels=description["channels"],
            prototypes=_load_prototypes(directory / PROTOTYPES, config.resolution),
        )
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BundleError(
            f"{weights_path} does not hold the weights of the {config.backbone} that config.yaml "
            f"describes: {first_line(error)}; restore both files from one copy of the bundle."
        ) from error


def read_metrics(directory: Path) -> dict[str, Any]:
    """Return the metrics.json of a bundle, of which nothing else is read.

    Raises:
        BundleError: it is not a JSON object.
        FormatError: a newer version wrote the bundle.
        OSError: it cannot be read.
    """
    path = directory / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}; restore the file.") from error
    if not isinstance(metrics, dict):
        raise BundleError(f"{path} is not a JSON object; restore the file.")
    check_format(path, metrics.get("format"), FORMAT)
    return metrics


def _load_prototypes(path: Path, resolution: int) -> tuple[tuple[str, ...], Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads((file.metadata() or {})[_NAMES_KEY])
            pixels_PRR = file.get_tensor("prototypes")
    except (SafetensorError, KeyError, ValueError) as error:
        raise BundleError(
            f"{path} does not hold class prototypes: {error}; restore the file, or remove it."
        ) from error
    if pixels_PRR.shape != (len(names), resolution, resolution):
        raise BundleError(
            f"{path} holds {tuple(pixels_PRR.shape)} pixels for {len(names)} classes at "
            f"{resolution} pixels; restore the file, or remove it."
        )
    return tuple(names), pixels_PRR.float() / 255


def _describe(result: TrialResult, command: str) -> dict[str, Any]:
    config, data = result.config, result.prepared.dataset
    device = result.device
    test = result.evaluator.evaluate(result.prepared.split("test", config.resolution, device))
    last, names = result.metrics, result.prepared.prototype_names
    return {
        "val_accuracy": last["val_accuracy"],
        "test_accuracy": test.accuracy,
        "cam_ssim": last["cam_ssim"],
        "cam_ssim_ceiling": last["cam_ssim_ceiling"],
        "cam_ssim_sample": last["cam_ssim_sample"],
        "cam_ssim_per_class": _by_name(names, result.evaluation.cam_ssim_P),
        "cam_ssim_ceiling_per_class": _by_name(
            names, result.prepared.ceiling(config.resolution, result.grid)
        ),
        **_errors(data.class_names, result.evaluation.confusion_CC),
        "test_cam_ssim": test.cam_ssim,
        "grid": list(result.grid),
        "images_per_second": last["images_per_second"],
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "epochs": int(last["epoch"]),
        "seconds": sum(epoch["seconds"] for epoch in result.history),
        "seed": config.seed,
        **asdict(result.hardware),
        "dataset_sha256": data.sha256,
        "git_commit": git_commit(),
        "versions": package_versions(),
        "command": command,
        "history": result.history,
    }


def _by_name(names: tuple[str, ...], values_P: Tensor) -> dict[str, float]:
    return dict(zip(names, values_P.tolist(), strict=True))


def _errors(names: tuple[str, ...], confusion_CC: Tensor) -> dict[str, Any]:
    """Return validation images per class, and the number of each wrong prediction by class."""
    errors = {}
    for label, row in enumerate(confusion_CC.tolist()):
        taken = {names[other]: count for other, count in enumerate(row) if count and other != label}
        errors[names[label]] = dict(sorted(taken.items(), key=lambda item: -item[1]))
    images = dict(zip(names, confusion_CC.sum(dim=1).tolist(), strict=True))
    return {"val_images_per_class": images, "val_errors": errors}


def _save_weights(path: Path, result: TrialResult) -> None:
    data, config = result.prepared.dataset, result.config
    description = {
        "class_names": data.class_names,
        "channels": data.channels,
        "mean": data.mean,
        "std": data.std,
        "output_stride": resolve_output_stride(
            config.backbone, config.resolution, data.channels, config.output_stride
        ),
    }
    metadata = {"format": "pt", _MODEL_KEY: json.dumps(description)}
    save_file(own_weights(result.model), path, metadata=metadata)


def _save_timm_config(path: Path, result: TrialResult) -> None:
    if isinstance(result.model, TimmCNN):
        data = result.prepared.dataset
        write_config(result.model, data.class_names, data.channels, result.preprocess, path)


def _save_prototypes(path: Path, result: TrialResult) -> None:
    """Write the prototypes with 8 bits per pixel."""
    prototypes_PRR = result.prepared.prototypes("train", result.config.resolution)
    pixels_PRR = (prototypes_PRR * 255).round().to(torch.uint8).contiguous()
    names = {_NAMES_KEY: json.dumps(result.prepared.prototype_names)}
    save_file({"prototypes": pixels_PRR}, path, metadata={"format": "pt", **names})


def _draw_cams(path: Path, result: TrialResult) -> None:
    config, last = result.config, result.metrics
    figure = figures.class_cams(
        result.evaluation.maps_PRR,
        result.prepared.prototypes("validation", config.resolution),
        result.prepared.prototype_names,
        result.evaluation.cam_ssim_P,
        result.prepared.ceiling(config.resolution, result.grid),
        f"{title(config)}: validation accuracy {last['val_accuracy']:.2%}, "
        f"CAM-prototype SSIM {last['cam_ssim']:.2f} of {last['cam_ssim_ceiling']:.2f}",
    )
    figures.save(figure, path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
