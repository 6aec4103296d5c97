"""Baseline: a conventional training script with torchvision transforms and a DataLoader.

Model, loss and optimiser are those of `batchcam.fit`. Data loading, memory layout, precision and
evaluation differ: images are transformed one at a time in worker processes, and the model computes
in float32 in the contiguous layout.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from batchcam.config import TrialConfig
from batchcam.data.splits import Split
from batchcam.losses import batch_cam_loss, prototype_loss
from batchcam.models import ExplainableModel
from batchcam.models.depthwise import DepthwiseConv2d


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Grey images as single samples, transformed as by `torchvision.datasets.MNIST`."""

    def __init__(self, split: Split, mean: float, std: float) -> None:
        self._split = split
        self._transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((mean,), (std,))]
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image `(1, H, W)`, scaled to [0, 1] and normalised, and its class."""
        image = Image.fromarray(self._split.images[index, 0])
        return self._transform(image), int(self._split.labels[index])


def loader(
    split: Split, mean: float, std: float, batch_size: int, *, shuffle: bool, workers: int = 2
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return a loader of `(images, labels)` batches; its workers persist between epochs."""
    return DataLoader(
        ImageDataset(split, mean, std),  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def plain_model(model: ExplainableModel) -> ExplainableModel:
    """Convert `model` in place to PyTorch's depthwise convolutions and contiguous weights."""
    for module in model.modules():
        if type(module) is DepthwiseConv2d:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return model.to(memory_format=torch.contiguous_format)


LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps logits, features and labels to a scalar."""


def loss_function(config: TrialConfig, prototypes_CRR: Tensor) -> LossFunction:
    """Return cross-entropy and the paper's losses with the weights of `config`."""

    def loss(logits_NC: Tensor, features_NKHW: Tensor, labels_N: Tensor) -> Tensor:
        total = config.lambda_class * F.cross_entropy(logits_NC, labels_N)
        for weight, term in (
            (config.lambda_proto, prototype_loss),
            (config.lambda_batch, batch_cam_loss),
        ):
            if weight:
                maps_loss = term(logits_NC, features_NKHW, labels_N, prototypes_CRR, config.metric)
                total = total + weight * maps_loss
        return total

    return loss


def train_epoch(
    model: ExplainableModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loss_function: LossFunction,
) -> float:
    """Train for an epoch in float32 and return the mean loss over the images.

    The loss is copied to the host after each step, as most scripts do.
    """
    model.train()
    total, images = 0.0, 0
    for x_N1RR, labels_N in batches:
        optimizer.zero_grad()
        features = model.features(x_N1RR)
        loss = loss_function(model.head(features), features, labels_N)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        total += loss.item() * len(labels_N)
        images += len(labels_N)
    return total / images


def accuracy(model: ExplainableModel, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the share of correctly classified images, in [0, 1]."""
    model.eval()
    correct, images = 0, 0
    with torch.no_grad():
        for x_N1RR, labels_N in batches:
            correct += int((model(x_N1RR).argmax(dim=1) == labels_N).sum())
            images += len(labels_N)
    return correct / images
