"""Training as most scripts write it: torchvision's transforms, a DataLoader with workers, a loop.

The model, the loss and the optimiser are those of `batchcam.fit`; what differs is how images
come to the model, in which layout and precision it computes, and how it is evaluated.
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


class Pictures(Dataset[tuple[Tensor, int]]):
    """Grey images one by one, as `torchvision.datasets.MNIST` hands them out."""

    def __init__(self, split: Split, mean: float, std: float) -> None:
        self._split = split
        self._transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((mean,), (std,))]
        )

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image `(1, H, W)`, scaled and normalised, and its class."""
        picture = Image.fromarray(self._split.images[index, 0])
        return self._transform(picture), int(self._split.labels[index])


def loader(
    split: Split, mean: float, std: float, batch_size: int, *, shuffle: bool, workers: int = 2
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return batches of `(images, labels)`; the workers live as long as the loader."""
    return DataLoader(
        Pictures(split, mean, std),  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def plain_model(model: ExplainableModel) -> ExplainableModel:
    """Return the model with weights laid out, and depthwise convolutions done, as PyTorch does."""
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
    """Train for an epoch in float32; return the mean loss, read after each step."""
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
    """Return the share of images classified correctly, in [0, 1]."""
    model.eval()
    correct, images = 0, 0
    with torch.no_grad():
        for x_N1RR, labels_N in batches:
            correct += int((model(x_N1RR).argmax(dim=1) == labels_N).sum())
            images += len(labels_N)
    return correct / images
