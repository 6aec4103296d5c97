"""Cross-entropy, the loss that classifies (first term of Eqs. 11 and 12)."""

import torch.nn.functional as F
from torch import Tensor

from batchcam.losses.base import Batch, Compute, TermContext, TermSpec


def _build(context: TermContext) -> Compute:
    del context

    def compute(batch: Batch) -> Tensor:
        return F.cross_entropy(batch.scores_NC, batch.labels_N)

    return compute


CROSS_ENTROPY = TermSpec(
    name="class",
    title="cross-entropy",
    source="Eqs. 11 and 12",
    search_range=(0.3, 3.0),
    build=_build,
)
