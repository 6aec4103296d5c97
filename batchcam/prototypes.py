"""Class prototypes: the images that the saliency maps of a class are compared with; class supports.

A class has one prototype, the mean or median of its images, or several, the means of k-means
clusters. Its support is the region of the image where it appears in the training images.

Shapes: N images, C classes, P prototypes, R pixels of the model's input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.cam import render
from batchcam.data.preprocessing import resize
from batchcam.errors import DataError
from batchcam.similarity import ssim

KINDS = ("mean", "median")
SUPPORT_THRESHOLD = 0.02
"""A pixel of a median prototype, which spans [0, 1], is on the support if it is brighter."""
SUPPORT_COVERAGE = 0.85
"""The fraction of a class's brightness that its support must hold."""
SUPPORT_MAX_WIDTH = 3
"""Pixels by which a support is dilated at most to hold that fraction."""


def class_prototypes(
    images: Tensor, labels: Tensor, num_classes: int, kind: str = "mean"
) -> Tensor:
    """Return one prototype per class, min-max scaled to [0, 1] (Section 3.1).

    Colour is averaged to grey first, since a CAM has a single channel.

    Args:
        images: `(N, H, W)` or `(N, channels, H, W)`, uint8 or float.
        labels: int64 `(N,)`.
        num_classes: the number of classes C.
        kind: "mean" (the paper's) or "median", pixel by pixel over the images of a class.

    Returns:
        `(C, H, W)` float32; each prototype spans [0, 1] exactly, a constant one is 0.

    Raises:
        DataError: a class has no image.
        ValueError: `kind` is unknown, or images and labels do not fit each other.

    Example:
        >>> import torch
        >>> images = torch.randint(0, 256, (6, 28, 28), dtype=torch.uint8)
        >>> class_prototypes(images, torch.tensor([0, 0, 1, 1, 2, 2]), num_classes=3).shape
        torch.Size([3, 28, 28])
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    if images.dim() not in (3, 4) or len(images) != len(labels):
        raise ValueError(
            "expected images (N, H, W) or (N, channels, H, W) and labels (N,), got "
            f"{tuple(images.shape)} and {tuple(labels.shape)}."
        )
    prototypes = []
    for label in range(num_classes):
        grey = _grey_members(images, labels, label)
        prototypes.append(grey.mean(dim=0) if kind == "mean" else grey.quantile(0.5, dim=0))
    return min_max(torch.stack(prototypes))


def _grey_members(images: Tensor, labels: Tensor, label: int) -> Tensor:
    members = images[labels == label].float()
    if len(members) == 0:
        raise DataError(
            f"class {label} has no image, so it has no prototype; add images of it or remove the "
            "class."
        )
    return members if members.dim() == 3 else members.mean(dim=1)


def cluster_centres(
    images: Tensor, labels: Tensor, num_classes: int, clusters: int, seed: int = 0
) -> Tensor:
    """Return the centres of k-means clusters of each class's images, in grey levels.

    Args:
        images: `(N, H, W)` or `(N, channels, H, W)`, uint8 or float.
        labels: int64 `(N,)`.
        num_classes: the number of classes C.
        clusters: the number of clusters of each class.
        seed: seeds the initial centres, the best of four draws by k-means++.

    Returns:
        `(C * clusters, H, W)` float32. The centres of class c begin at row `c * clusters`; the
        cluster with the most images comes first.

    Raises:
        DataError: a class has fewer images than clusters.
    """
    from sklearn.cluster import KMeans

    centres = []
    for label in range(num_classes):
        grey = _grey_members(images, labels, label)
        rows = grey.flatten(1).numpy()
        if len(rows) < clusters:
            raise DataError(
                f"class {label} has {len(rows)} images, too few for {clusters} clusters; set "
                "clusters lower or add images."
            )
        found = KMeans(clusters, n_init=4, random_state=seed).fit(rows)
        by_size = torch.from_numpy(found.labels_).long().bincount(minlength=clusters).argsort()
        ordered = torch.from_numpy(found.cluster_centers_).float()[by_size.flip(0)]
        centres.append(ordered.view(clusters, *grey.shape[1:]))
    return torch.cat(centres)


def nearest_prototype_index(
    images: Tensor, labels: Tensor, centres_PHW: Tensor, num_classes: int
) -> Tensor:
    """Return the index of the nearest centre of its own class for each image, int64 `(N,)`.

    The distance is Euclidean in grey levels, as in k-means.
    """
    clusters = len(centres_PHW) // num_classes
    groups = torch.empty_like(labels)
    for label, own in enumerate(torch.split(centres_PHW, clusters)):
        members = labels == label
        if members.any():
            grey = _grey_members(images, labels, label)
            distance = torch.cdist(grey.flatten(1), own.flatten(1).to(grey))
            groups[members] = label * clusters + distance.argmin(dim=1)
    return groups


def cluster_prototypes(images: Tensor, prototype_index: Tensor, centres_PHW: Tensor) -> Tensor:
    """Return the mean image of each cluster, min-max scaled; its centre if it has no image.

    Args:
        images: `(N, H, W)` or `(N, channels, H, W)`, uint8 or float.
        prototype_index: int64 `(N,)`, the cluster of each image; see
            :func:`nearest_prototype_index`.
        centres_PHW: the centres of the clusters.

    Returns:
        `(P, H, W)` float32 in [0, 1].
    """
    means = [
        _grey_members(images, prototype_index, index).mean(dim=0)
        if (prototype_index == index).any()
        else centre
        for index, centre in enumerate(centres_PHW)
    ]
    return min_max(torch.stack(means))


def class_supports(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the support of each class: the pixels where its training images show it.

    The support is the region where the median prototype is bright, dilated by the smallest number
    of pixels, at most 3, with which it holds 85 % of the brightness of the class's images.

    The median ignores a patch that appears in a quarter of the images; a mean does not. The
    dilation allows for variation within a class. Its width adapts to the class: digits vary more
    than coats, and a width that suits digits would reach the corners of the images of coats.

    Args:
        images: `(N, H, W)` or `(N, channels, H, W)`, uint8 or float.
        labels: int64 `(N,)`.
        num_classes: the number of classes C.

    Returns:
        `(C, H, W)` bool.

    Raises:
        DataError: a class has no image.
    """
    supports = []
    medians_CHW = class_prototypes(images, labels, num_classes, "median")
    for label, median_HW in enumerate(medians_CHW):
        brightness_HW = _grey_members(images, labels, label).mean(dim=0)
        core_1HW = (median_HW > SUPPORT_THRESHOLD).float().unsqueeze(0)
        for width in range(SUPPORT_MAX_WIDTH + 1):
            wide_1HW = F.max_pool2d(core_1HW, 2 * width + 1, stride=1, padding=width)
            held = (brightness_HW * wide_1HW[0]).sum()
            if held >= SUPPORT_COVERAGE * brightness_HW.sum():
                break
        supports.append(wide_1HW[0] > 0)
    return torch.stack(supports)


def supported_cells(supports_CHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the cells of a grid that overlap the support of each class, `(C, *grid)` bool."""
    return F.adaptive_max_pool2d(supports_CHW.float().unsqueeze(1), grid).squeeze(1) > 0


def off_support_mask(supports_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Return where each class has no support, `(C, *size)` float32: 1 off the support, 0 on it.

    Args:
        supports_CHW: bool; see :func:`class_supports`.
        size: rows and columns, of a CAM grid or of the model's input.
    """
    return 1 - supported_cells(supports_CHW, size).float()


def resize_prototypes(prototypes_CHW: Tensor, resolution: int) -> Tensor:
    """Return prototypes resized to the model's input, `(C, R, R)`, min-max scaled again."""
    return min_max(resize(prototypes_CHW.unsqueeze(1), resolution).squeeze(1))


def min_max(maps_CHW: Tensor) -> Tensor:
    """Scale each map to span [0, 1]; a constant map becomes 0."""
    low = maps_CHW.amin(dim=(1, 2), keepdim=True)
    span = maps_CHW.amax(dim=(1, 2), keepdim=True) - low
    return (maps_CHW - low) / span.where(span > 0, torch.ones_like(span))


def ssim_ceiling(prototypes: Tensor, grid: int | tuple[int, int], steps: int = 300) -> Tensor:
    """Return the highest SSIM to each prototype that an optimised CAM of this grid reaches.

    An upsampled coarse CAM cannot show the detail of a prototype, however it is trained. To find
    the limit, a map of `grid` cells is optimised for SSIM after :func:`batchcam.cam.render`, by
    Adam from the pooled values of the prototype. The result is a lower bound of the true maximum,
    in practice tight.

    Args:
        prototypes: `(C, R, R)` float, scaled to [0, 1].
        grid: cells per side, or (rows, columns).
        steps: gradient steps.

    Returns:
        `(C,)` float32, at most 1.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    resolution = prototypes.shape[-1]
    target = prototypes.detach().float().cpu()
    start = F.adaptive_avg_pool2d(target.unsqueeze(1), (rows, columns)).squeeze(1)
    with torch.enable_grad():
        cells = start.clamp(min=0.01).requires_grad_()
        optimizer = torch.optim.Adam([cells], lr=0.03)
        best = torch.full((len(target),), -1.0)
        for _ in range(steps):
            index = ssim(render(F.relu(cells), resolution), target)
            best = torch.maximum(best, index.detach())
            optimizer.zero_grad()
            torch.autograd.backward(-index.sum())
            optimizer.step()
    return best
