"""The page of a report: its words and tables, put around the charts into one file."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from scipy.stats import binomtest

from batchcam.losses import TERMS
from studies.outcome.report.charts import FILTERS, all_charts, distinct, filter_options
from studies.outcome.report.content import Content, data_uri, halves, read, searched_values
from studies.outcome.report.importance import MIN_TRIALS, Importance, importance
from studies.space import SWITCHED
from studies.trial import run_name

REPORT = "report.html"

_TITLES = {"val_accuracy": "validation accuracy", "cam_ssim": "SSIM of class CAMs"}
_CONFUSIONS = 8
_MAX_CLASSES = 20
"""Columns of the gallery; the first classes are shown."""


def write(folder: Path) -> Path:
    """Write the report of the study in a folder, and return its path.

    Raises:
        ConfigError: the folder holds no study, or one that has reported nothing.
    """
    path = folder / REPORT
    path.write_text(render(read(folder)), encoding="utf-8")
    return path


def render(content: Content) -> str:
    """Return the report as HTML that needs nothing else, not even a network."""
    importances = {name: _importance(content, name) for name in _TITLES}
    charts = all_charts(content, importances)
    records, settings = content.records, content.settings
    options = filter_options(content)
    sections = {
        "question": "Question",
        "best": "Best",
        "front": "Accuracy and explanation",
        "what": "Importance",
        "tried": "Tried",
        "learning": "Curves",
        "cams": "CAMs",
        "errors": "Misclassified",
        "cost": "Cost",
        "trials": "All trials",
        "made": "How it was made",
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
            {"title": _TITLES[name], "chart": f"importance-{name}", "caption": _explained(found)}
            for name, found in importances.items()
            if found is not None
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


def measured(metrics: Mapping[str, Any], name: str) -> float:
    """Return a metric of a bundle: the mean over fresh seeds where it was confirmed."""
    confirmed = metrics.get("confirmed")
    return float(metrics[name] if confirmed is None else confirmed[name]["mean"])


def findings(content: Content) -> list[str]:
    """Return what the study found, in sentences; nothing without bundles."""
    chosen = content.chosen
    if "knee" not in chosen:
        return ["The study has exported no bundles yet."]
    knee = chosen["knee"]
    text = [
        f"Between accuracy and explanation, {run_name(content.configs['knee'])} is the best "
        f"compromise: {measured(knee, 'val_accuracy'):.2%} of the validation images, SSIM "
        f"{measured(knee, 'cam_ssim'):.3f} of {knee['cam_ssim_ceiling']:.3f} that its grid can "
        "reach."
    ]
    baseline = chosen.get("baseline")
    if baseline is None:
        text.append("No trial without explanation came to the end: there is no baseline.")
    elif baseline["trial_id"] == knee["trial_id"]:
        text.append("It is the baseline itself: explanation in the loss has brought nothing here.")
    else:
        accuracy = measured(baseline, "val_accuracy")
        gained = 100 * (measured(knee, "val_accuracy") - accuracy)
        text.append(
            f"The baseline, {run_name(content.configs['baseline'])}, has "
            f"{accuracy:.2%} and SSIM {measured(baseline, 'cam_ssim'):.3f}: the compromise "
            f"is {abs(gained):.2f} points {'more' if gained >= 0 else 'less'} accurate."
        )
    if "confirmed" not in knee:
        text.append(
            "Each of these is one run, chosen among many by the numbers shown: they flatter it. "
            "The option “confirm” trains the best again with fresh seeds."
        )
    return text


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share of `count` images (Wilson 1927)."""
    interval = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _bundles(content: Content) -> list[dict[str, str]]:
    rows = []
    for name, metrics in content.chosen.items():
        accuracy, ssim = f"{metrics['val_accuracy']:.4f}", f"{metrics['cam_ssim']:.3f}"
        if "confirmed" in metrics:
            of = metrics["confirmed"]
            accuracy, ssim = (
                f"{of[key]['mean']:.{digits}f} ± {of[key]['high'] - of[key]['mean']:.{digits}f}"
                for key, digits in (("val_accuracy", 4), ("cam_ssim", 3))
            )
        elif "val_images_per_class" in metrics:
            count = sum(metrics["val_images_per_class"].values())
            low, high = wilson(metrics["val_accuracy"], count)
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
            f"Means over fresh runs with the seeds {seeds}, ± the 95 % confidence interval of the "
            "mean (Student's t). The test split was read once for each bundle, after the choice."
        )
    return (
        "In parentheses the 95 % confidence interval for that many validation images (Wilson); it "
        "knows nothing of what another seed would give. The test split was read once for each "
        "bundle, after the choice."
    )


def _space(content: Content) -> list[tuple[str, str]]:
    space = content.settings.space
    names = {
        "backbones": "backbone",
        "resolutions": "resolution, pixels",
        "metrics": "metric",
        "output_strides": "output stride, where there are several",
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
    # SSIM is no number where a model's features were none.
    usable = [each for each in content.records if math.isfinite(each.metrics.get(name, math.nan))]
    points = [searched_values(record.config) for record in usable]
    values = [record.metrics[name] for record in usable]
    return importance(points, values, content.settings.seed)


def _explained(found: Importance) -> str:
    if found.explained <= 0:
        return (
            f"The forest predicts unseen trials no better than their mean (R² {found.explained:.2f}"
            "): this ranking says nothing."
        )
    return f"The forest explains {found.explained:.0%} of the variance of trials it has not seen."


def _stopping(content: Content) -> str:
    stopped = sum(record.state == "stopped" for record in content.records)
    budget = content.settings.max_epochs * len(content.records)
    spent = sum(int(record.metrics.get("epoch", 0)) for record in content.records)
    return (
        f"{stopped} of {len(content.records)} trials were stopped early (triangles): {spent} of "
        f"{budget} epochs were trained."
    )


def _cost(content: Content) -> list[tuple[str, str]]:
    seconds = sum(row["seconds"] for row in content.rows)
    epochs = sum(row["epochs"] for row in content.rows)
    rows = [
        ("trials", str(len(content.records))),
        ("epochs", str(epochs)),
        ("training and evaluation, the trials' times added", _duration(seconds)),
    ]
    knee = content.chosen.get("knee")
    if knee is not None:
        rows += [
            ("parameters of the compromise", f"{knee['parameters']:,}"),
            ("its training", f"{_duration(knee['seconds'])} on {knee['device']}"),
        ]
    return rows


def _gallery(content: Content) -> list[dict[str, Any]]:
    names = content.class_names[:_MAX_CLASSES]
    rows: list[dict[str, Any]] = []
    for bundle, metrics in distinct(content.chosen):
        picture = content.pictures.get(str(metrics["trial_id"]))
        if picture is None:
            continue
        prototypes, cams = halves(picture)
        total = len(content.class_names)
        if not rows:
            cells = _cells(prototypes, names, total, [""] * len(names))
            rows.append({"name": "prototype", "cells": cells})
        of, ceiling = metrics["cam_ssim_per_class"], metrics["cam_ssim_ceiling_per_class"]
        notes = [f"{of[name]:.2f} / {ceiling[name]:.2f}" for name in names]
        rows.append({"name": bundle, "cells": _cells(cams, names, total, notes)})
    return rows


def _cells(
    strip: Any, names: Sequence[str], total: int, notes: Sequence[str]
) -> list[dict[str, str]]:
    side = strip.width // total
    return [
        {
            "class_name": name,
            "picture": data_uri(strip.crop((side * place, 0, side * (place + 1), strip.height))),
            "note": note,
        }
        for place, (name, note) in enumerate(zip(names, notes, strict=True))
    ]


def _confusions(content: Content) -> dict[str, Any] | None:
    bundles = [(name, m) for name, m in distinct(content.chosen) if "val_errors" in m]
    if not bundles:
        return None
    counts: dict[tuple[str, str], list[int]] = {}
    for place, (_, metrics) in enumerate(bundles):
        for name, taken in metrics["val_errors"].items():
            for other, count in taken.items():
                counts.setdefault((name, other), [0] * len(bundles))[place] = count
    most = sorted(counts.items(), key=lambda item: -sum(item[1]))[:_CONFUSIONS]
    rows = [{"pair": f"{name} taken for {other}", "counts": of} for (name, other), of in most]
    return {"bundles": [name for name, _ in bundles], "rows": rows}


def _provenance(content: Content) -> str:
    said = [f"Seed {content.settings.seed}"]
    for metrics in list(content.chosen.values())[:1]:
        said.append(f"data set SHA-256 {metrics['dataset_sha256'][:16]}…")
        said.append(f"commit {metrics['git_commit'] or 'unknown'}")
        said += [f"{name} {number}" for name, number in metrics["versions"].items()]
    return "; ".join(said) + "."


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _join(names: Sequence[str]) -> str:
    words = [_TITLES.get(name, name.replace("_", " ")) for name in names]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _without_nan(value: Any) -> Any:
    """Return JSON's value with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _raw(name: str) -> Markup:
    return Markup(files("studies.outcome.report").joinpath(name).read_text(encoding="utf-8"))


@cache
def _vega() -> Markup:
    """Return Vega, Vega-Lite and Vega-Embed as one script, which ends in no element of HTML."""
    # Its stub asks for a snippet, without which it bundles what puts Vega-Embed into the window.
    bundle: Callable[[], str] = vl_convert.javascript_bundle  # type: ignore[assignment]
    return Markup(bundle().replace("</script", "<\\/script"))
