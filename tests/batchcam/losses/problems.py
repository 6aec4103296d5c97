"""Loss terms on tensors that a test gives, without a data set or a trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from batchcam.config import LAMBDAS, TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.explainers import EXPLAINERS
from batchcam.losses import Batch, TermContext, build_terms
from batchcam.models import ExplainableModel


class Head(ExplainableModel):
    """A head with the closed-form weights and gradients that a test gives, or with none."""

    def __init__(self, weights_CK: Tensor | None = None, gradients: Tensor | None = None) -> None:
        super().__init__()
        self._weights_CK = weights_CK
        self._gradients_CKHW = gradients

    def class_weights(self, cells: int) -> Tensor | None:
        del cells
        return self._weights_CK

    def class_gradients(self, rows: int, columns: int) -> Tensor | None:
        del rows, columns
        return self._gradients_CKHW


@dataclass(frozen=True)
class Context(TermContext):
    """A context with the off-support mask that a test gives."""

    mask: Tensor | None = None

    def off_support_mask(self, size: tuple[int, int]) -> Tensor:
        del size
        assert self.mask is not None
        return self.mask


def _unused(images: Tensor) -> Tensor:
    raise AssertionError(f"unexpected second forward pass on images of shape {tuple(images.shape)}")


def total_loss(
    fields: dict[str, Any],
    logits_NC: Tensor,
    features_NKHW: Tensor,
    labels_N: Tensor,
    prototypes_PRR: Tensor,
    *,
    images_NCRR: Tensor | None = None,
    forward: Callable[[Tensor], Tensor] = _unused,
    off_support: Tensor | None = None,
    model: ExplainableModel | None = None,
    **known: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the terms that `fields` of TrialConfig turn on, and each term.

    Weights that `fields` omits are 0. `known` is passed to :class:`batchcam.losses.Batch`.
    """
    config = TrialConfig(**{**dict.fromkeys(LAMBDAS, 0.0), **fields})
    grid = (features_NKHW.shape[2], features_NKHW.shape[3])
    context = Context(
        config, cast(PreparedData, None), grid, torch.device("cpu"), prototypes_PRR, off_support
    )
    batch = Batch(
        model or Head(),
        forward,
        torch.zeros(len(labels_N), 1, 8, 8) if images_NCRR is None else images_NCRR,
        labels_N,
        features_NKHW,
        logits_NC,
        EXPLAINERS[config.cam],
        **known,
    )
    terms = build_terms(context)
    values = {term.spec.name: term.compute(batch) for term in terms}
    total = sum((term.weight * values[term.spec.name] for term in terms), torch.zeros(()))
    return total, values
