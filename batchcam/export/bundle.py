"""A bundle: a folder that holds a trained model and all that is needed to reuse or retrain it.

    config.yaml         the TrialConfig
    model.safetensors   the weights, and how to build the model around them
    metrics.json        what was measured, with its provenance
    cams.png            each class's CAM beside its prototype
    README.md           the model card
    prototypes.safetensors   the class prototypes of the training images
    config.json         of a timm backbone: timm's own description, by which timm loads the folder

Nothing in it is ever unpickled: loading a bundle runs no code that came with it.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from batchcam import figures
from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedSplit
from batchcam.data.preprocessing import Preprocess
from batchcam.devices import resolve_device
from batchcam.errors import BundleError, check_format
from batchcam.export.model_card import model_card, title
from batchcam.export.timm_format import CONFIG_FILE, load_weights, own_weights, write_config
from batchcam.models import ExplainableModel, TimmCNN, create_model, resolve_output_stride
from batchcam.provenance import command_line, git_commit, package_versions
from batchcam.similarity import ssim
from batchcam.training.evaluate import Evaluation, Evaluator
from batchcam.training.fit import TrialResult

PROTOTYPES = "prototypes.safetensors"
FILES = ("config.yaml", "model.safetensors", "metrics.json", "cams.png", "README.md", PROTOTYPES)
FORMAT = 1
"""The newest format of a bundle that this version reads, and the one that it writes."""
_MODEL_KEY = "batchcam"
"""Key of the weights' metadata under which the model is described, as JSON."""
_NAMES_KEY = "names"
"""Key of the prototypes' metadata under which their names are, as JSON."""


@dataclass(frozen=True)
class LoadedModel:
    """A classifier from a bundle: predicts and explains images, on the CPU unless moved.

    Attributes:
        config: the configuration it was trained with.
        metrics: the bundle's metrics.json.
        class_names: the name of each class, in the order of the logits.
        model: the network itself, in `eval` mode.
        preprocess: what turns uint8 images into the network's input.
        channels: 1 for grey images, 3 for RGB.
        prototypes: the class prototypes of the training images, `(P, R, R)` in [0, 1], by name;
            None in bundles that were written without them.
    """

    config: TrialConfig
    metrics: dict[str, Any]
    class_names: tuple[str, ...]
    model: ExplainableModel
    preprocess: Preprocess
    channels: int
    prototypes: tuple[tuple[str, ...], Tensor] | None = None

    def predict(self, images: npt.ArrayLike | Tensor) -> npt.NDArray[np.int64]:
        """Return the predicted class of each image, `(N,)`; names are in `class_names`.

        Args:
            images: uint8, `(N, H, W)` for grey or `(N, channels, H, W)`, of any size.

        Raises:
            BundleError: the images have another type, shape or number of channels.
        """
        classes: npt.NDArray[np.int64] = self.probabilities(images).argmax(axis=1)
        return classes

    def probabilities(self, images: npt.ArrayLike | Tensor) -> npt.NDArray[np.float32]:
        """Return the softmax probabilities, `(N, C)`."""
        probabilities, _ = self._run(images, None)
        return probabilities

    def explain(
        self, images: npt.ArrayLike | Tensor, targets: npt.ArrayLike | None = None
    ) -> npt.NDArray[np.float32]:
        """Return one CAM per image at the model's resolution, `(N, R, R)` in [0, 1].

        Of the kind that the model was trained with: a Grad-CAM, or a HiResCAM.

        Args:
            images: as for :meth:`predict`.
            targets: the class to explain for each image, `(N,)`; the predicted ones if None.
        """
        _, maps = self._run(images, targets)
        return maps

    def nearest_prototypes(
        self, maps: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the prototype that each CAM resembles most, `(N,)`, and their SSIM, `(N,)`.

        Args:
            maps: `(N, R, R)` in [0, 1], of :meth:`explain`.

        Raises:
            BundleError: the bundle has no prototypes.
        """
        if self.prototypes is None:
            raise BundleError(
                "the bundle has no prototypes; one trained anew from its config.yaml has."
            )
        _, prototypes_PRR = self.prototypes
        cams_NRR = torch.from_numpy(maps)
        found = torch.stack(
            [ssim(cams_NRR, each_RR.expand_as(cams_NRR)) for each_RR in prototypes_PRR]
        )
        best, which = found.max(dim=0)
        return which.numpy(), best.numpy()

    def to(self, device: str) -> Self:
        """Move the network to a device, and return this model."""
        self.model.to(resolve_device(device))
        return self

    def evaluate(self, split: PreparedSplit) -> Evaluation:
        """Evaluate on a split that is on :attr:`device`, at the model's resolution.

        See :meth:`batchcam.training.evaluate.Evaluator.evaluate`.
        """
        return self._evaluator.evaluate(split)

    def error_maps(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`batchcam.training.evaluate.Evaluator.error_maps`."""
        device = self.device
        return self._evaluator.error_maps(
            images.to(device), labels.to(device), len(self.class_names)
        )

    def _run(
        self, images: npt.ArrayLike | Tensor, targets: npt.ArrayLike | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        # Inference tensors, if the caller has that mode on, could not carry the CAM's gradients.
        with torch.inference_mode(mode=False):
            return self._explain(self._checked(images).to(self.device), targets)

    def _explain(
        self, checked: Tensor, targets: npt.ArrayLike | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        if len(checked) == 0:
            side = self.preprocess.resolution
            empty = np.zeros((0, len(self.class_names)), np.float32)
            return empty, np.zeros((0, side, side), np.float32)
        chosen = None
        if targets is not None:
            chosen = torch.as_tensor(np.asarray(targets), dtype=torch.int64, device=self.device)
            valid = (chosen >= 0) & (chosen < len(self.class_names))
            if chosen.shape != (len(checked),) or not valid.all():
                raise BundleError(
                    f"targets must be {len(checked)} class numbers from 0 to "
                    f"{len(self.class_names) - 1}, one per image."
                )
        probabilities, maps = self._evaluator.explain(checked, chosen)
        return probabilities.numpy(), maps.numpy()

    def _checked(self, images: npt.ArrayLike | Tensor) -> Tensor:
        try:
            tensor = images if isinstance(images, Tensor) else torch.as_tensor(np.array(images))
        except (TypeError, ValueError) as error:
            raise BundleError(f"images are no array of pixels: {error}.") from error
        if tensor.dtype != torch.uint8:
            raise BundleError(f"images are {tensor.dtype}; give uint8 pixels from 0 to 255.")
        if tensor.dim() == 3:
            tensor = tensor.unsqueeze(1)
        if tensor.dim() != 4 or tensor.shape[1] != self.channels:
            raise BundleError(
                f"images have the shape {tuple(tensor.shape)}; expected (N, {self.channels}, H, W)"
                + (" or (N, H, W)." if self.channels == 1 else ".")
            )
        return tensor

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.model, self.preprocess, self.config.cam)


def save_bundle(
    directory: Path,
    result: TrialResult,
    *,
    command: str | None = None,
    extra_metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a finished run as a bundle, evaluating it on the test split, once.

    The folder appears whole or not at all.

    Args:
        directory: a folder that does not exist yet, or is empty.
        result: the run.
        command: what made it; the command line of this process if None.
        extra_metrics: further entries of metrics.json.

    Returns:
        The content of metrics.json.

    Raises:
        BundleError: the folder exists and is not empty, or cannot be written.
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
    """Make the parents of a folder that is to be written, and refuse one that cannot be.

    Raises:
        BundleError: it is a file, is not empty, or its parent cannot be written to.
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
            f"{directory} cannot be made: {error.filename} is a file; choose another folder."
        ) from error
    except OSError as error:
        raise BundleError(
            f"{directory} cannot be written: {error.strerror}; choose another folder or change its "
            "permissions."
        ) from error


def load(directory: str | Path) -> LoadedModel:
    """Load a bundle. No data set is needed, no network, and no pickle is read.

    Raises:
        BundleError: a file is missing, damaged, or does not fit the others.
        FormatError: a newer version wrote the bundle.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a folder; give the folder of a bundle.")
    missing = [name for name in FILES[:3] if not (directory / name).is_file()]
    if missing:
        raise BundleError(f"{directory} is no bundle: it lacks {', '.join(missing)}.")
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
            f"describes: {str(error).splitlines()[0]}."
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
        raise BundleError(f"{path} is not JSON: {error}.") from error
    if not isinstance(metrics, dict):
        raise BundleError(f"{path} is not a JSON object; copy it from a backup.")
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
        raise BundleError(f"{path} does not hold class prototypes: {error}.") from error
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
        "device": device.type,
        "threads": torch.get_num_threads(),
        "dataset_sha256": data.sha256,
        "git_commit": git_commit(),
        "versions": package_versions(),
        "command": command,
        "history": result.history,
    }


def _by_name(names: tuple[str, ...], values_P: Tensor) -> dict[str, float]:
    return dict(zip(names, values_P.tolist(), strict=True))


def _errors(names: tuple[str, ...], confusion_CC: Tensor) -> dict[str, Any]:
    """Return how many validation images each class has, and as what how many were taken."""
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
    """Write the prototypes as they look: 8 bits a pixel."""
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
