"""Renders a report as one HTML file: texts, tables and charts."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchcam.losses import TERMS
from studies import paths
from studies.outcome.report.charts import FILTERS, all_charts, distinct_bundles, filter_options
from studies.outcome.report.content import Content, data_uri, read, searched_values, split_picture
from studies.outcome.report.importance import MIN_TRIALS, Importance, importance
from studies.space import SWITCHED
from studies.statistics import fraction_interval
from studies.trial import run_name

_TITLES = {"val_accuracy": "validation accuracy", "cam_ssim": "SSIM of class CAMs"}
_CONFUSIONS = 8
_MAX_CLASSES = 20
"""The largest number of classes in the gallery; the first ones are shown."""


def write(folder: Path) -> Path:
    """Write the report of the study in `folder`, and return the report's path.

    Raises:
        ConfigError: the folder is not a study's, no trial has reported, or a bundle is damaged.
    """
    path = folder / paths.REPORT
    path.write_text(render(read(folder)), encoding="utf-8")
    return path


def render(content: Content) -> str:
    """Return the report as self-contained HTML, which loads nothing from a network."""
    importances = {name: _importance(content, name) for name in _TITLES}
    charts = all_charts(content, importances)
    records, settings = content.records, content.settings
    options = filter_options(content)
    sections = {
        "question": "Question",
        "best": "Best",
        "front": "Accuracy and explanation",
        "importance": "Importance",
        "configurations": "Configurations",
        "learning": "Curves",
        "cams": "CAMs",
        "errors": "Misclassified",
        "cost": "Cost",
        "trials": "All trials",
        "reproduce": "Reproduce",
    }
    gallery, confusions = _gallery(content), _confusions(content)
    if not gallery:
        del sections["cams"]
    if confusions is None:
        del sections["errors"]
    environment = Environment(
        loader=PackageLoader("studies.outcome.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html").render(
        study=settings.study,
        css=_raw("page.css"),
        js=_raw("page.js"),
        vega=_vega(),
        lead=f"{len(records)} trials of up to {settings.max_epochs} epochs on {settings.dataset}, "
        f"maximising {_join(settings.objectives)}.",
        sections=sections.items(),
        objectives=_join(settings.objectives),
        space=_space(content),
        findings=findings(content),
        bundles=_bundles(content),
        interval_note=_interval_note(content),
        filters=[
            {"name": name, "label": FILTERS[name], "values": values}
            for name, values in options.items()
        ],
        filter_names=list(options),
        trials=content.rows,
        failures=[
            f"{number}: {record.state}{f', {record.error}' if record.error else ''}"
            for number, record in enumerate(records)
            if not record.usable
        ],
        importances=[
            {"title": _TITLES[name], "chart": f"importance-{name}", "caption": _caption(result)}
            for name, result in importances.items()
            if result is not None
        ],
        importance_minimum=MIN_TRIALS,
        stopping=_stopping(content),
        gallery=gallery,
        class_names=content.class_names[:_MAX_CLASSES],
        errors=confusions,
        cost=_cost(content),
        command=next((str(metrics["command"]) for metrics in content.chosen.values()), None),
        provenance=_provenance(content),
        settings=content.settings_file,
        data=_without_nan(
            {"charts": charts, "data": {"trials": content.rows, "curves": content.curves}}
        ),
    )


def reported_value(metrics: Mapping[str, Any], name: str) -> float:
    """Return a metric of a bundle: the mean over the fresh seeds if the bundle was confirmed."""
    confirmed = metrics.get("confirmed")
    return float(metrics[name] if confirmed is None else confirmed[name]["mean"])


def findings(content: Content) -> list[str]:
    """Return the study's main results as sentences."""
    chosen = content.chosen
    if "knee" not in chosen:
        return ["The study has exported no bundles yet."]
    knee = chosen["knee"]
    text = [
        f"The best {_kind_of_best(content)} is {run_name(content.configs['knee'])}. It classifies "
        f"{reported_value(knee, 'val_accuracy'):.2%} of the validation images correctly and "
        f"reaches SSIM {reported_value(knee, 'cam_ssim'):.3f} of {knee['cam_ssim_ceiling']:.3f}, "
        "the highest value that its CAM grid allows."
    ]
    baseline = chosen.get("baseline")
    if baseline is None:
        text.append("There is no baseline: no trial with cross-entropy alone was completed.")
    elif baseline["trial_id"] == knee["trial_id"]:
        text.append(
            "It is also the baseline: explanation terms in the loss brought no improvement here."
        )
    else:
        accuracy = reported_value(baseline, "val_accuracy")
        gained = 100 * (reported_value(knee, "val_accuracy") - accuracy)
        text.append(
            f"The baseline, {run_name(content.configs['baseline'])}, reaches {accuracy:.2%} and "
            f"SSIM {reported_value(baseline, 'cam_ssim'):.3f}: the best is "
            f"{abs(gained):.2f} points {'more' if gained >= 0 else 'less'} accurate."
        )
    if "confirmed" not in knee:
        text.append(
            "Each of these is one run, selected among many by the numbers shown, which are "
            "therefore optimistic. The option “confirm” trains the best configurations again with "
            "fresh seeds."
        )
    return text


def _kind_of_best(content: Content) -> str:
    """Return how the first configuration was chosen: by one objective, or among several."""
    titles = [each.title for each in content.settings.objective_records]
    if len(titles) == 1:
        return f"configuration by {titles[0]}"
    return f"compromise between {', '.join(titles[:-1])} and {titles[-1]}"


def _bundles(content: Content) -> list[dict[str, str]]:
    """Return the rows of the table of bundles."""
    rows = []
    for name, metrics in content.chosen.items():
        accuracy, ssim = f"{metrics['val_accuracy']:.4f}", f"{metrics['cam_ssim']:.3f}"
        if "confirmed" in metrics:
            accuracy, ssim = (
                f"{interval['mean']:.{digits}f} ± {interval['high'] - interval['mean']:.{digits}f}"
                for interval, digits in (
                    (metrics["confirmed"]["val_accuracy"], 4),
                    (metrics["confirmed"]["cam_ssim"], 3),
                )
            )
        elif "val_images_per_class" in metrics:
            count = sum(metrics["val_images_per_class"].values())
            low, high = fraction_interval(metrics["val_accuracy"], count)
            accuracy += f" ({low:.4f} to {high:.4f})"
        rows.append(
            {
                "name": name,
                "configuration": run_name(content.configs[name]),
                "accuracy": accuracy,
                "ssim": ssim,
                "ceiling": f"{metrics['cam_ssim_ceiling']:.3f}",
                "test": f"{metrics['test_accuracy']:.4f}",
                "epochs": str(metrics["epochs"]),
            }
        )
    return rows


def _interval_note(content: Content) -> str:
    confirmed = [m["confirmed"] for m in content.chosen.values() if "confirmed" in m]
    if confirmed:
        seeds = ", ".join(map(str, confirmed[0]["seeds"]))
        return (
            f"Means over fresh runs with the seeds {seeds}, ± half the width of the 95 % "
            "confidence interval of the mean (Student's t). The test split was read once per "
            "bundle, after the selection."
        )
    return (
        "Parentheses show the 95 % confidence interval for the number of validation images "
        "(Wilson). It does not include the variation between seeds. The test split was read once "
        "per bundle, after the selection."
    )


def _space(content: Content) -> list[tuple[str, str]]:
    space = content.settings.space
    names = {
        "backbones": "backbone",
        "resolutions": "resolution, pixels",
        "metrics": "metric",
        "output_strides": "output stride, if several are feasible",
    }
    rows = [(label, ", ".join(map(str, getattr(space, name)))) for name, label in names.items()]
    for name, label, off in (
        *(
            (f"lambda_{spec.name}", f"λ_{spec.name} ({spec.title})", spec.name in SWITCHED)
            for spec in TERMS.values()
        ),
        ("learning_rate", "learning rate", False),
        ("weight_decay", "weight decay", False),
    ):
        if name in space.left_out:
            continue
        low, high = getattr(space, name)
        rows.append((label, f"{'off, or ' if off else ''}{low:g} to {high:g}, logarithmic"))
    return rows


def _importance(content: Content, name: str) -> Importance | None:
    # SSIM is NaN if a model's features were not finite.
    usable = [
        record for record in content.records if math.isfinite(record.metrics.get(name, math.nan))
    ]
    points = [searched_values(record.config) for record in usable]
    values = [record.metrics[name] for record in usable]
    return importance(points, values, content.settings.seed)


def _caption(result: Importance) -> str:
    if result.explained <= 0:
        return (
            "The forest predicts held-out trials no better than their mean "
            f"(R² {result.explained:.2f}): this ranking has no meaning."
        )
    return f"The forest explains {result.explained:.0%} of the variance of held-out trials."


def _stopping(content: Content) -> str:
    stopped = sum(record.state == "stopped" for record in content.records)
    budget = content.settings.max_epochs * len(content.records)
    spent = sum(int(record.metrics.get("epoch", 0)) for record in content.records)
    return (
        f"{stopped} of {len(content.records)} trials were stopped early (triangles); {spent} of "
        f"{budget} epochs were trained."
    )


def _cost(content: Content) -> list[tuple[str, str]]:
    seconds = sum(row["seconds"] for row in content.rows)
    epochs = sum(row["epochs"] for row in content.rows)
    rows = [
        ("trials", str(len(content.records))),
        ("epochs", str(epochs)),
        ("training and evaluation, total over trials", _duration(seconds)),
    ]
    knee = content.chosen.get("knee")
    if knee is not None:
        rows += [
            ("parameters of the compromise", f"{knee['parameters']:,}"),
            (
                "training time of the compromise",
                f"{_duration(knee['seconds'])} on {knee['device']}",
            ),
        ]
    return rows


def _gallery(content: Content) -> list[dict[str, Any]]:
    """Return the rows of the gallery: the prototypes, then the class CAMs of each bundle."""
    names = content.class_names[:_MAX_CLASSES]
    rows: list[dict[str, Any]] = []
    for bundle, metrics in distinct_bundles(content.chosen):
        picture = content.pictures.get(str(metrics["trial_id"]))
        if picture is None:
            continue
        prototypes, cams = split_picture(picture)
        total = len(content.class_names)
        if not rows:
            cells = _cells(prototypes, names, total, [""] * len(names))
            rows.append({"name": "prototype", "cells": cells})
        ssim, ceiling = metrics["cam_ssim_per_class"], metrics["cam_ssim_ceiling_per_class"]
        notes = [f"{ssim[name]:.2f} / {ceiling[name]:.2f}" for name in names]
        rows.append({"name": bundle, "cells": _cells(cams, names, total, notes)})
    return rows


def _cells(
    strip: Any, names: Sequence[str], total: int, notes: Sequence[str]
) -> list[dict[str, str]]:
    """Cut a strip of `total` square pictures, one per class; return the cells of the first ones."""
    side = strip.width // total
    return [
        {
            "class_name": name,
            "picture": data_uri(strip.crop((side * column, 0, side * (column + 1), strip.height))),
            "note": note,
        }
        for column, (name, note) in enumerate(zip(names, notes, strict=True))
    ]


def _confusions(content: Content) -> dict[str, Any] | None:
    """Return the most frequent confusions with a count per bundle; None if none is recorded."""
    bundles = [(name, m) for name, m in distinct_bundles(content.chosen) if "val_errors" in m]
    if not bundles:
        return None
    counts: dict[tuple[str, str], list[int]] = {}
    for column, (_, metrics) in enumerate(bundles):
        for name, predicted in metrics["val_errors"].items():
            for other, count in predicted.items():
                counts.setdefault((name, other), [0] * len(bundles))[column] = count
    most = sorted(counts.items(), key=lambda item: -sum(item[1]))[:_CONFUSIONS]
    rows = [
        {"pair": f"{name} classified as {other}", "counts": by_bundle}
        for (name, other), by_bundle in most
    ]
    return {"bundles": [name for name, _ in bundles], "rows": rows}


def _provenance(content: Content) -> str:
    parts = [f"Seed {content.settings.seed}"]
    for metrics in list(content.chosen.values())[:1]:
        parts.append(f"data set SHA-256 {metrics['dataset_sha256'][:16]}…")
        parts.append(f"commit {metrics['git_commit'] or 'unknown'}")
        parts += [f"{name} {number}" for name, number in metrics["versions"].items()]
    return "; ".join(parts) + "."


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _join(names: Sequence[str]) -> str:
    titles = [_TITLES.get(name, name.replace("_", " ")) for name in names]
    return " and ".join([", ".join(titles[:-1]), titles[-1]] if len(titles) > 1 else titles)


def _without_nan(value: Any) -> Any:
    """Return a JSON value in which None replaces NaN and infinities, which JSON cannot express."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _raw(name: str) -> Markup:
    """Return a file of this package as text that the template does not escape."""
    return Markup(files("studies.outcome.report").joinpath(name).read_text(encoding="utf-8"))


@cache
def _vega() -> Markup:
    """Return Vega, Vega-Lite and Vega-Embed as one script, with `</script` escaped."""
    # The stub requires a snippet. Without one the bundle exports Vega-Embed to `window`.
    bundle: Callable[[], str] = vl_convert.javascript_bundle  # type: ignore[assignment]
    return Markup(bundle().replace("</script", "<\\/script"))
