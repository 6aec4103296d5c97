"""Run one of several DistributedDataParallel processes, on its part of a batch.

`python distributed_worker.py RANK PROCESSES FOLDER` writes the value and the gradients of each
loss, after one backward pass, to FOLDER/RANK.pt.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchcam.losses import batch_cam_loss, prototype_loss

IMAGES, CLASSES = 8, 3
LOSSES = ("prototype", "per process", "over processes")


class Model(nn.Module):
    """Returns logits and features. Without batch normalisation, images do not mix."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.hidden = nn.Linear(4, 6)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.convolution(images).relu()
        # The head is not linear, so each image has its own channel weights.
        return self.classifier(self.hidden(features.mean(dim=(2, 3))).tanh()), features


def problem() -> tuple[Model, Tensor, Tensor, Tensor]:
    """Return a float64 model, images, labels that differ between the parts, and prototypes."""
    torch.manual_seed(0)
    model = Model().double()
    images = torch.rand(IMAGES, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 2, 0, 1, 2])
    return model, images, labels, torch.rand(CLASSES, 16, 16, dtype=torch.float64)


def loss_of(name: str, group: dist.ProcessGroup | None) -> Callable[..., Tensor]:
    """Return the named loss, a function of (logits, features, labels, prototypes)."""
    if name == "prototype":
        return partial(prototype_loss, metric="l2")
    over = group if name == "over processes" else None
    return partial(batch_cam_loss, metric="l2", process_group=over)


def gradients(
    model: nn.Module, loss: Callable[..., Tensor], images: Tensor, labels: Tensor, wanted: Tensor
) -> dict[str, Tensor]:
    """Return the loss, and the gradient of loss plus cross-entropy for each parameter.

    Without cross-entropy the last bias has no gradient, which DistributedDataParallel refuses.
    """
    model.zero_grad()
    logits, features = model(images)
    value = loss(logits, features, labels, wanted)
    torch.autograd.backward(F.cross_entropy(logits, labels) + value)
    own = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {"loss": value.detach()} | {n: g.clone() for n, g in own.items() if g is not None}


def main(rank: int, processes: int, folder: Path) -> None:
    """Join the process group, compute gradients on this process's part, and write them."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
    )
    model, images, labels, prototypes = problem()
    part = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
    parallel = DistributedDataParallel(model)
    group = dist.group.WORLD
    found = {
        name: gradients(parallel, loss_of(name, group), images[part], labels[part], prototypes)
        for name in LOSSES
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
