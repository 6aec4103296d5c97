"""The model card of a bundle, and the short names of its run and its loss."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from batchcam.config import TrialConfig
from batchcam.explainers import EXPLAINERS
from batchcam.losses import ExtraTerms, used_terms
from batchcam.losses.cross_entropy import CROSS_ENTROPY
from batchcam.models import TimmCNN
from batchcam.training.fit import TrialResult

_TASK = "image-classification"


def title(config: TrialConfig, extra_terms: ExtraTerms = ()) -> str:
    """Return a short name of a run for people: backbone, data set and loss."""
    return f"{config.backbone} on {config.dataset}, {loss_name(config, extra_terms)}"


def loss_name(config: TrialConfig, extra_terms: ExtraTerms = ()) -> str:
    """Return the name of a run's loss, with its weights."""
    explainer = EXPLAINERS[config.cam]
    how = config.metric.upper()
    if config.cam != TrialConfig.cam:
        how += f", {explainer.title}"
    terms = [
        f"{spec.title} {weight:.3g}" + (f" ({how})" if spec.compares_cams else "")
        for spec, weight in used_terms(config, extra_terms)
        if spec != CROSS_ENTROPY
    ]
    return " + ".join(terms) or CROSS_ENTROPY.title


def loss_terms(config: TrialConfig) -> list[str]:
    """Return the names of the terms of a run's loss beside cross-entropy."""
    return [spec.title for spec, _ in used_terms(config) if spec != CROSS_ENTROPY]


def _front_matter(name: str, config: TrialConfig, metrics: Mapping[str, Any]) -> str:
    def result(metric: str, value: float, title: str | None = None) -> EvalResult:
        return EvalResult(
            task_type=_TASK,
            dataset_type=config.dataset,
            dataset_name=config.dataset,
            dataset_split="test",
            metric_type=metric,
            metric_value=value,
            metric_name=title,
        )

    data = ModelCardData(
        library_name="batchcam",
        pipeline_tag=_TASK,
        tags=[_TASK, "explainable-ai", "grad-cam", "batch-cam"],
        datasets=[config.dataset],
        metrics=["accuracy"],
        model_name=name,
        eval_results=[
            result("accuracy", metrics["test_accuracy"]),
            result("ssim", metrics["test_cam_ssim"], "CAM-prototype SSIM"),
        ],
    )
    return data.to_yaml()


def _elsewhere(result: TrialResult) -> str:
    if isinstance(result.model, TimmCNN):
        return (
            'Without batchcam: `timm.create_model("local-dir:path/to/this/folder", '
            "pretrained=True)`."
        )
    return "Without batchcam: `batchcam export DIR --out DIR2` writes it as ONNX."


def model_card(result: TrialResult, metrics: Mapping[str, Any]) -> str:
    """Return the README.md of a bundle: front matter in Hugging Face's format, and Markdown."""
    config = result.config
    name = title(config, result.extra_terms)
    partial_run = (
        f"\nTraining was ended after {metrics['epochs']} of {config.epochs} epochs.\n"
        if metrics["epochs"] < config.epochs
        else ""
    )
    return f"""---
{_front_matter(name, config, metrics)}
---

# {name}

![Class CAMs beside their prototypes](cams.png)

An image classifier for {config.resolution}x{config.resolution} pixels, trained by
{loss_name(config, result.extra_terms)} with batchcam (Batch-CAM, arXiv:2510.00664).

| | |
|---|---|
| validation accuracy | {metrics["val_accuracy"]:.4f} |
| test accuracy | {metrics["test_accuracy"]:.4f} |
| CAM-prototype SSIM (class level, validation) | {metrics["cam_ssim"]:.4f} |
| its ceiling on a {result.grid[0]}x{result.grid[1]} grid | {metrics["cam_ssim_ceiling"]:.4f} |
| parameters | {metrics["parameters"]:,} |
| training images per second | {metrics["images_per_second"]:,.0f} ({metrics["device"]}) |
| seed | {metrics["seed"]} |
{partial_run}
Made by

    {metrics["command"]}

at commit {metrics["git_commit"] or "unknown"}, with \
{", ".join(f"{name} {number}" for name, number in metrics["versions"].items())}.

## Use

```python
import batchcam

model = batchcam.load("path/to/this/folder")
classes = model.predict(images)  # uint8, (N, {result.prepared.dataset.channels}, H, W)
maps = model.explain(images)  # (N, {config.resolution}, {config.resolution}), in [0, 1]
```

{_elsewhere(result)}

`batchcam verify DIR` retrains it from config.yaml and compares the metrics;
`batchcam train --config DIR/config.yaml --out DIR2` trains it again.

## Limits

A high SSIM does not show that the model looks at the right region: a loss with a Batch-CAM term
optimises this similarity. The model knows only the classes and the kind of images in its training
set.
"""
