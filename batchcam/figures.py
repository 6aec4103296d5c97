"""Figures: class CAMs beside their prototypes, errors, overlays on images.

Figures are drawn without pyplot, so that they can be made in any thread and leave no global state.
Matplotlib is imported when the first figure is drawn; the import takes half a second.

Shapes: C classes, R pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAM_COLOURS = "magma"
_MAX_CLASSES = 20
"""Columns of a class figure at most. Of more classes the first ones are drawn."""

Image = npt.NDArray[np.uint8]


def class_cams(
    maps_CRR: Tensor,
    prototypes_CRR: Tensor,
    class_names: Sequence[str],
    ssim_C: Tensor,
    ceiling_C: Tensor,
    title: str,
) -> Figure:
    """Draw each class's prototype above its reconstructed one (Figs. 2-5), with its SSIM.

    Example:
        >>> import torch
        >>> maps, prototypes, ssim = torch.rand(2, 28, 28), torch.rand(2, 28, 28), torch.rand(2)
        >>> figure = class_cams(maps, prototypes, ["cat", "dog"], ssim, torch.ones(2), "BCPL")
        >>> len(figure.axes)
        4
    """
    notes = [
        f"{value:.2f} / {ceiling:.2f}"
        for value, ceiling in zip(ssim_C.tolist(), ceiling_C.tolist(), strict=True)
    ]
    return class_rows(
        [("prototype", prototypes_CRR, None), ("CAM\nSSIM / ceiling", maps_CRR, notes)],
        class_names,
        title,
    )


def misclassified(
    error_maps_CRR: Tensor,
    maps_CRR: Tensor,
    confusion_CC: Tensor,
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """Draw each class's CAM above the CAM of its errors, with the most frequent wrong class.

    Example:
        >>> import torch
        >>> maps, confusion = torch.rand(2, 28, 28), torch.tensor([[5, 1], [0, 6]])
        >>> figure = misclassified(torch.rand(2, 28, 28), maps, confusion, ["cat", "dog"], "BCPL")
        >>> len(figure.axes)
        4
    """
    notes = confusion_notes(confusion_CC, class_names)
    return class_rows(
        [("CAM", maps_CRR, None), ("CAM of errors", error_maps_CRR, notes)], class_names, title
    )


def confusion_notes(confusion_CC: Tensor, class_names: Sequence[str]) -> list[str]:
    """Return for each class its number of errors, and the most frequent wrong class.

    Example:
        >>> import torch
        >>> confusion = torch.tensor([[5, 2, 1], [0, 8, 0], [0, 0, 8]])
        >>> print(*confusion_notes(confusion, ["cat", "dog", "cow"]), sep="; ")
        3 wrong,
        2 as dog; none; none
    """
    notes = []
    for label, row in enumerate(confusion_CC.clone()):
        row[label] = 0
        count, other = int(row.max()), int(row.argmax())
        notes.append(
            f"{int(row.sum())} wrong,\n{count} as {class_names[other]}" if count else "none"
        )
    return notes


Row = tuple[str, Tensor, Sequence[str] | None]
"""A row of a class figure: its label, its maps `(C, R, R)`, and a note below each map."""


def class_rows(
    rows: Sequence[Row],
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """Draw a row of maps for each entry, a column for each class.

    Example:
        >>> import torch
        >>> figure = class_rows([("CAM", torch.rand(3, 14, 14), None)], ["a", "b", "c"], "Grad-CAM")
        >>> [axis.get_title() for axis in figure.axes]
        ['a', 'b', 'c']
    """
    shown = min(len(class_names), _MAX_CLASSES)
    figure = _new_figure(figsize=(1.15 * shown + 1.3, 1.3 * len(rows) + 0.7))
    axes = figure.subplots(len(rows), shown, squeeze=False)
    for row, (label, maps_CRR, notes) in enumerate(rows):
        for column in range(shown):
            axis = axes[row][column]
            _draw_map(axis, maps_CRR[column])
            if row == 0:
                axis.set_title(_shorten(class_names[column]), fontsize=9)
            if notes is not None:
                axis.set_xlabel(notes[column], fontsize=8)
        axes[row][0].set_ylabel(label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def overlay(
    image_CHW: Image, map_RR: Tensor, title: str, prototype: tuple[str, Tensor] | None = None
) -> Figure:
    """Draw an image, the image under its CAM, and a prototype if one is given, side by side.

    Args:
        image_CHW: uint8, grey or RGB.
        map_RR: the CAM, in [0, 1].
        title: of the figure.
        prototype: a line of text, and a map `(R, R)` in [0, 1].

    Example:
        >>> import torch
        >>> image = np.zeros((1, 28, 28), dtype=np.uint8)
        >>> prototype = ("prototype of 7", torch.rand(28, 28))
        >>> figure = overlay(image, torch.rand(14, 14), "a 7", prototype)
        >>> [axis.get_title() for axis in figure.axes]
        ['image', 'CAM', 'prototype of 7']
    """
    picture = image_CHW.transpose(1, 2, 0)
    extent = (0.0, float(picture.shape[1]), float(picture.shape[0]), 0.0)
    panels = 2 if prototype is None else 3
    figure = _new_figure(figsize=(2.6 * panels, 2.9))
    plain, explained, *rest = figure.subplots(1, panels)
    for axis in (plain, explained):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent)
        axis.set_axis_off()
    explained.imshow(map_RR.numpy(), cmap=CAM_COLOURS, vmin=0, vmax=1, alpha=0.6, extent=extent)
    for axis, text in ((plain, "image"), (explained, "CAM")):
        axis.set_title(text, fontsize=9)
    if prototype is not None:
        _draw_map(rest[0], prototype[1])
        rest[0].set_title(prototype[0], fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def tile(maps_CRR: Tensor, prototypes_CRR: Tensor, min_side: int = 56) -> Image:
    """Return prototypes above CAMs as one RGB array `(2R', C R', 3)`, without drawing a figure.

    R' is R times the smallest integer with which it is at least `min_side` pixels.

    Example:
        >>> import torch
        >>> tile(torch.rand(10, 28, 28), torch.rand(10, 28, 28)).shape
        (112, 560, 3)
    """
    scale = max(1, -(-min_side // maps_CRR.shape[-1]))
    rows = [np.concatenate(list(maps.numpy()), axis=1) for maps in (prototypes_CRR, maps_CRR)]
    grey = np.concatenate(rows, axis=0).repeat(scale, axis=0).repeat(scale, axis=1)
    from matplotlib import colormaps

    colours = colormaps[CAM_COLOURS](grey.clip(0, 1), bytes=True)
    return np.asarray(colours[..., :3], dtype=np.uint8)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without metadata, so that equal figures give equal files.

    Example:
        >>> import tempfile, torch
        >>> figure = class_rows([("CAM", torch.rand(2, 14, 14), None)], ["a", "b"], "Grad-CAM")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(figure, Path(folder) / "cams.png")
    """
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _new_figure(figsize: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")


def _draw_map(axis: Axes, map_RR: Tensor) -> None:
    """Draw a map; one that is 0 everywhere is a frame with the word "empty"."""
    axis.set_xticks([])
    axis.set_yticks([])
    empty = not map_RR.any()
    for spine in axis.spines.values():
        spine.set_visible(empty)
        spine.set_color("lightgrey")
    if empty:
        axis.set_box_aspect(1)
        axis.text(
            0.5, 0.5, "empty", transform=axis.transAxes, ha="center", va="center", color="grey"
        )
    else:
        axis.imshow(map_RR.numpy(), cmap=CAM_COLOURS, vmin=0, vmax=1)


def _shorten(name: str, limit: int = 12) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
