"""The charts of a report, as Vega-Lite specifications.

Charts inherit text colours from the page, so that they follow its light, dark and print styles.
They refer to data by name, so that the page holds each data set once. A chart of trials has a
parameter for every filter of the page.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from batchcam.losses import TERMS
from studies.outcome.report.content import Content
from studies.outcome.report.importance import Importance
from studies.space import SEARCHED, SWITCHED

FILTERS = {
    "backbone": "Backbone",
    "resolution": "Resolution",
    "loss": "Loss",
    "metric": "Metric",
    "state": "State",
}
"""Columns of a trial that have a filter, and the filters' labels."""

ALL = "all"
Spec = dict[str, Any]

# Distinguishable on white and on black, also with red-green colour blindness.
_COLOURS = ("#8c8c8c", "#e69f00", "#3a8fd0", "#b36fb8", "#2ca58d", "#d9663d", "#8f8a2c", "#d66a9c")
_DARKER = ("#6d55d6", "#946600", "#1f5c8c", "#753f79", "#17705e", "#93401f", "#5b5818", "#93416a")
"""Darker variants, for losses with prototype exchange; violet for prototype exchange alone, because
a darker grey would not stand out from grey."""
_HEIGHT = 330
_OFF_STEP = 0.15
"""Parallel coordinates: distance between the smallest weight and a weight of 0 ("off")."""
_INK = "currentColor"
_TEXT_STYLE = {
    "labelColor": _INK,
    "titleColor": _INK,
    "labelFontSize": 12,
    "titleFontSize": 12,
    "titleFontWeight": "normal",
}
_CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "axis": _TEXT_STYLE
    | {
        "gridColor": _INK,
        "gridOpacity": 0.13,
        "domainColor": _INK,
        "domainOpacity": 0.4,
        "tickColor": _INK,
        "tickOpacity": 0.4,
    },
    "legend": _TEXT_STYLE | {"labelLimit": 280},
    "view": {"stroke": None},
    "autosize": {"type": "fit-x", "contains": "padding"},
}
_STATES = {
    "completed": "circle",
    "stopped": "triangle-down",
    "failed": "cross",
    "unfinished": "square",
}


def all_charts(content: Content, importances: Mapping[str, Importance | None]) -> dict[str, Spec]:
    """Return the charts for which the study has data, by the id of their element in the page."""
    charts = {
        "pareto": pareto(content),
        "parallel": parallel(content),
        "curve-accuracy": curves(content, "accuracy", "validation accuracy"),
        "curve-ssim": curves(content, "ssim", "SSIM of class CAMs"),
        "throughput": throughput(content),
    }
    for name, result in importances.items():
        if result is not None:
            charts[f"importance-{name}"] = importance_bars(result)
    if any("val_errors" in metrics for metrics in content.chosen.values()):
        charts["errors"] = errors(content)
    return charts


def filter_options(content: Content) -> dict[str, list[str]]:
    """Return the values of each filter that has more than one."""
    options = {name: sorted({row[name] for row in content.rows}) for name in FILTERS}
    return {name: values for name, values in options.items() if len(values) > 1}


def pareto(content: Content) -> Spec:
    """Return a scatter plot of error and SSIM; tooltips show the trial and its class CAMs."""
    # The error axis is logarithmic, to spread the best trials. An error of 0 has no logarithm and
    # is drawn at half of the smallest positive error.
    errors = [row["val_error"] for row in content.rows]
    floor = min((error for error in errors if error > 0), default=1e-3) / 2
    error = alt.X(
        "error:Q",
        title="validation error (logarithmic; better towards the right)",
        scale=alt.Scale(type="log", reverse=True, domain=_padded(floor, errors), nice=False),
        axis=alt.Axis(format="~%", tickCount=6),
    )
    similarity = alt.Y(
        "cam_ssim:Q",
        title="SSIM of class CAMs and prototypes (better towards the top)",
        scale=_scale(row["cam_ssim"] for row in content.rows),
    )
    base = _trials(content).transform_calculate(error=f"max(datum.val_error, {floor})")
    points = base.mark_point(filled=True, size=110, opacity=0.85).encode(
        x=error,
        y=similarity,
        color=_loss_colours(content),
        shape=_state_shapes(content),
        tooltip=_tooltip(),
    )
    layers: list[Any] = []
    if set(content.settings.objectives) == {"val_accuracy", "cam_ssim"}:
        steps = base.transform_filter("datum.front").mark_line(
            interpolate="step-after", color=_INK, opacity=0.45, strokeDash=[4, 3]
        )
        layers.append(steps.encode(x=error, y=similarity, order="error:Q"))
    rings = base.transform_filter("datum.front").mark_point(
        size=260, stroke=_INK, strokeWidth=1.5, filled=False
    )
    layers += [rings.encode(x=error, y=similarity), points]
    return _specification(
        alt.layer(*layers).properties(height=420),
        "Scatter plot of the validation error and the SSIM of every trial.",
        content,
    )


def parallel(content: Content) -> Spec:
    """Return parallel coordinates: an axis per parameter that differs, then accuracy and SSIM."""
    rows, ticks = parallel_rows(content)
    order = list(dict.fromkeys(tick["axis"] for tick in ticks))
    x = alt.X(
        "axis:N",
        sort=order,
        title=None,
        scale=alt.Scale(padding=0.35),
        axis=alt.Axis(labelAngle=0, grid=True, domain=False, labelLimit=110, ticks=False),
    )
    y = alt.Y("position:Q", axis=None, scale=alt.Scale(domain=[-0.06, 1.06], nice=False))
    base = _with_trials(alt.Chart(alt.InlineData(values=rows)), content)
    lines = base.mark_line(interpolate="monotone").encode(
        x=x,
        y=y,
        detail="number:N",
        order="place:Q",
        color=_loss_colours(content),
        opacity=alt.condition("datum.front", alt.value(0.95), alt.value(0.22)),
        strokeWidth=alt.condition("datum.front", alt.value(2.4), alt.value(1.1)),
    )
    points = base.mark_circle(size=45, opacity=0.75).encode(
        x=x,
        y=y,
        color=_loss_colours(content),
        tooltip=[alt.Tooltip("axis:N", title="parameter"), "value:N", *_tooltip()],
    )
    labels = (
        alt.Chart(alt.InlineData(values=ticks))
        .mark_text(align="left", dx=7, fontSize=10, color=_INK, opacity=0.75)
        .encode(x=x, y=y, text="text:N")
    )
    return _specification(
        alt.layer(lines, points, labels).properties(height=360),
        "Parallel coordinates of every trial: parameters, accuracy and SSIM.",
        content,
    )


def parallel_rows(content: Content) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the data of the parallel coordinates.

    Returns:
        One row per trial and axis, with the trial's `position` on the axis in [0, 1]; and the ticks
        of all axes.
    """
    rows, ticks = [], []
    logarithmic = dict(SEARCHED)
    names = [name for name, _ in SEARCHED if len({row[f"of_{name}"] for row in content.rows}) > 1]
    axes = [(f"of_{name}", name, logarithmic[name]) for name in names]
    axes += [("val_accuracy", "accuracy", False), ("cam_ssim", "SSIM", False)]
    for place, (column, axis, log) in enumerate(axes):
        values = [row[column] for row in content.rows]
        positions, axis_ticks = _axis(values, log)
        ticks += [{"axis": axis, "position": at, "text": text} for at, text in axis_ticks]
        rows += [
            {
                "number": row["number"],
                "axis": axis,
                "place": place,
                "position": at,
                "value": _text(row[column]),
            }
            for row, at in zip(content.rows, positions, strict=True)
        ]
    return rows, ticks


def curves(content: Content, column: str, title: str) -> Spec:
    """Return a line chart of a metric by epoch; triangles mark trials that were stopped early."""
    base = _with_trials(alt.Chart(alt.NamedData("curves")), content)
    last = max(2, content.settings.max_epochs)
    epoch = alt.X(
        "epoch:Q",
        title="epoch",
        axis=alt.Axis(format="d", values=list(range(1, last + 1, -(-last // 12)))),
        scale=alt.Scale(domain=[1, last], nice=False, padding=8),
    )
    value = alt.Y(
        f"{column}:Q", title=title, scale=_scale(point[column] for point in content.curves)
    )
    lines = base.mark_line(strokeWidth=1.4).encode(
        x=epoch,
        y=value,
        detail="number:N",
        color=_loss_colours(content, columns=2),
        opacity=alt.condition("datum.front", alt.value(0.95), alt.value(0.4)),
    )
    ends = base.transform_filter("datum.last").mark_point(filled=True, size=70)
    return _specification(
        alt.layer(
            lines,
            ends.encode(
                x=epoch,
                y=value,
                color=_loss_colours(content, columns=2),
                shape=_state_shapes(content, legend=False),
                tooltip=_tooltip(),
            ),
        ).properties(height=_HEIGHT),
        f"Line chart of the {title} of every trial by epoch.",
        content,
    )


def throughput(content: Content) -> Spec:
    """Return a chart of the images per second of every trial, by backbone and resolution."""
    models = {f"{row['backbone']} {row['resolution']}" for row in content.rows}
    chart = (
        _trials(content)
        .transform_calculate(model="datum.backbone + ' ' + datum.resolution")
        .mark_tick(thickness=2, size=20)
        .encode(
            x=alt.X(
                "images_per_second:Q",
                title="training images per second",
                scale=_scale([0.0, *(row["images_per_second"] for row in content.rows)]),
            ),
            y=alt.Y("model:N", title=None),
            color=_loss_colours(content),
            tooltip=_tooltip(),
        )
        .properties(height=max(60, 34 * len(models)))
    )
    return _specification(
        chart, "Images per second of every trial, by backbone and resolution.", content
    )


def importance_bars(result: Importance) -> Spec:
    """Return a bar chart of the importance of each parameter, with standard deviations."""
    order = [row["parameter"] for row in result.rows]
    base = alt.Chart(alt.InlineData(values=result.rows)).encode(
        y=alt.Y("parameter:N", sort=order, title=None)
    )
    bars = base.mark_bar(color=_COLOURS[2], opacity=0.8).encode(
        x=alt.X(
            "mean:Q",
            title="increase in squared error, relative to the variance",
            axis=alt.Axis(tickCount=5),
        ),
        tooltip=["parameter:N", alt.Tooltip("mean:Q", format=".2f")],
    )
    spread = base.mark_rule(color=_INK, opacity=0.7).encode(x="low:Q", x2="high:Q")
    chart = alt.layer(bars, spread).properties(height=max(80, 26 * len(result.rows)))
    return _specification(chart, "Bar chart of the importance of each parameter.", None)


def errors(content: Content) -> Spec:
    """Return a bar chart of the misclassified validation images of each class, by bundle."""
    rows = [
        {
            "bundle": bundle,
            "class": name,
            "wrong": sum(metrics["val_errors"][name].values()),
            "of": metrics["val_images_per_class"][name],
            "most": ", ".join(
                f"{count} as {other}"
                for other, count in list(metrics["val_errors"][name].items())[:3]
            ),
        }
        for bundle, metrics in distinct_bundles(content.chosen)
        if "val_errors" in metrics
        for name in metrics["val_errors"]
    ]
    names = list(dict.fromkeys(row["class"] for row in rows))
    bundles = list(dict.fromkeys(row["bundle"] for row in rows))
    chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar()
        .encode(
            x=alt.X(
                "wrong:Q",
                title="misclassified validation images",
                axis=alt.Axis(format="d", tickMinStep=1),
            ),
            y=alt.Y("class:N", sort=names, title=None),
            yOffset=alt.YOffset("bundle:N", sort=bundles),
            color=alt.Color(
                "bundle:N",
                title="bundle",
                sort=bundles,
                scale=alt.Scale(domain=bundles, range=[_COLOURS[0], *_COLOURS[2:]][: len(bundles)]),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=[
                "bundle:N",
                "class:N",
                "wrong:Q",
                "of:Q",
                alt.Tooltip("most:N", title="most frequent errors"),
            ],
        )
        .properties(height=max(120, (8 + 11 * len(bundles)) * len(names)))
    )
    return _specification(chart, "Bar chart of the misclassified images of each class.", None)


def distinct_bundles(
    chosen: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return name and metrics of the bundles, baseline first.

    Bundles of the same trial appear once, with their names joined by commas.
    """
    names: dict[str, list[str]] = {}
    for name, metrics in sorted(chosen.items(), key=lambda item: item[0] != "baseline"):
        names.setdefault(str(metrics["trial_id"]), []).append(name)
    return [(", ".join(group), chosen[group[0]]) for group in names.values()]


def _trials(content: Content) -> alt.Chart:
    """Return a chart with a row per trial, filtered by the page's filters."""
    return _filtered(alt.Chart(alt.NamedData("trials")), content)


def _with_trials(chart: alt.Chart, content: Content) -> alt.Chart:
    """Join the columns of trials to a chart whose rows have a trial's `number`, and filter it."""
    columns = [name for name in content.rows[0] if name != "number"]
    of_trial = alt.LookupData(data=alt.NamedData("trials"), key="number", fields=columns)
    return _filtered(chart.transform_lookup("number", from_=of_trial), content)


def _filtered(chart: alt.Chart, content: Content) -> alt.Chart:
    for name in filter_options(content):
        chart = chart.transform_filter(f"filter_{name} == '{ALL}' || datum.{name} == filter_{name}")
    return chart


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("name:N", title="title"),
        alt.Tooltip("picture:N", title="image"),
        alt.Tooltip("number:Q", title="trial"),
        alt.Tooltip("val_accuracy:Q", title="accuracy", format=".4f"),
        alt.Tooltip("cam_ssim:Q", title="SSIM", format=".3f"),
        alt.Tooltip("cam_ssim_ceiling:Q", title="SSIM ceiling", format=".3f"),
        alt.Tooltip("epochs:Q", title="epochs"),
        alt.Tooltip("state:N", title="state"),
        alt.Tooltip("images_per_second:Q", title="images/s", format=",.0f"),
    ]


def _loss_colours(content: Content, columns: int = 4) -> alt.Color:
    losses = sorted({row["loss"] for row in content.rows}, key=_loss_order)
    scale = alt.Scale(domain=losses, range=loss_colours(losses))
    return alt.Color("loss:N", title="loss", scale=scale, legend=_legend(columns))


def loss_colours(losses: Sequence[str]) -> list[str]:
    """Return a colour for each loss.

    Combinations of the first four terms have the same colours in every report. Other combinations
    take colours that are unused in this report. Colours repeat only if a report has more losses
    than there are colours.

    Args:
        losses: titles of terms joined by " + ".
    """
    palette = _COLOURS + _DARKER
    masks = [_loss_order(loss)[0] for loss in losses]
    used = {mask for mask in masks if mask < len(palette)}
    unused = [index for index in range(len(palette)) if index not in used] or [0]
    others = [mask for mask in masks if mask >= len(palette)]
    substitutes = dict(zip(others, itertools.cycle(unused), strict=False))
    return [palette[substitutes.get(mask, mask)] for mask in masks]


def _loss_order(loss: str) -> tuple[int, str]:
    """Return a sort key whose first part is a bit mask of the loss's terms."""
    terms = loss.split(" + ")
    titles = [TERMS[name].title for name in SWITCHED]
    return sum(1 << bit for bit, title in enumerate(titles) if title in terms), loss


def _state_shapes(content: Content, legend: bool = True) -> alt.Shape:
    states = [state for state in _STATES if any(row["state"] == state for row in content.rows)]
    scale = alt.Scale(domain=states, range=[_STATES[state] for state in states])
    symbols = None
    if legend:
        symbols = _legend(len(states))
        symbols.symbolFillColor = symbols.symbolStrokeColor = _INK
    return alt.Shape("state:N", title="state", scale=scale, legend=symbols)


def _legend(columns: int) -> alt.Legend:
    return alt.Legend(orient="top", symbolOpacity=1, direction="horizontal", columns=columns)


def _scale(values: Iterable[float]) -> alt.Scale:
    """Return a scale over all finite values, so that filtering does not change the axis."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    return alt.Scale(domain=[low, high if high > low else low + 1e-3], zero=False, nice=True)


def _padded(floor: float, errors: Iterable[float]) -> list[float]:
    """Return the domain of the logarithmic error axis, with a margin of 15 % on both sides."""
    drawn = [max(error, floor) for error in errors]
    return [min(drawn) / 1.15, max(drawn) * 1.15]


def _axis(values: Sequence[Any], log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the positions of values on an axis from 0 to 1, and its ticks `(position, text)`."""
    if isinstance(values[0], str):
        categories = sorted(set(values), key=_numbers_first)
        position = {
            category: index / max(1, len(categories) - 1)
            for index, category in enumerate(categories)
        }
        return [position[value] for value in values], [
            (at, category) for category, at in position.items()
        ]
    if min(values) == 0 < max(values):  # Weights of a term that may be off: 0 gets its own tick.
        weights = sorted({value for value in values if value > 0})
        positions, ticks = _axis([value or weights[0] for value in values], True)
        shifted = [
            _OFF_STEP + (1 - _OFF_STEP) * at if value else 0.0
            for at, value in zip(positions, values, strict=True)
        ]
        return shifted, [(0.0, "off"), (_OFF_STEP, ticks[0][1]), ticks[1]]
    if log:
        positions, _ = _axis([math.log10(value) for value in values], False)
    else:
        low, high = min(values), max(values)
        positions = [(value - low) / ((high - low) or 1.0) for value in values]
    return positions, [(0.0, _text(min(values))), (1.0, _text(max(values)))]


def _numbers_first(text: str) -> tuple[bool, int, str]:
    """Return a sort key that puts integers, in numeric order, before other strings."""
    return (not text.isdigit(), int(text) if text.isdigit() else 0, text)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _specification(chart: Any, description: str, content: Content | None) -> Spec:
    """Return the specification of a chart with the page's width and colours.

    Args:
        chart: an Altair chart.
        description: text for screen readers.
        content: adds a parameter for each filter of this content; None for unfiltered charts.
    """
    if content is not None:
        params = [alt.param(name=f"filter_{name}", value=ALL) for name in filter_options(content)]
        chart = chart.add_params(*params)
    chart = chart.properties(width="container", description=description)
    spec: Spec = chart.to_dict()
    return spec | {"config": _CONFIG}
