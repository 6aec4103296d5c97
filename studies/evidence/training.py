"""The model of a run: trained, resumed, or loaded as it was kept."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.training.evaluate import Evaluation
from batchcam.training.fit import EpochReport, TrialResult, fit
from studies.evidence.controls import CONTROLS, controlled
from studies.evidence.runs import Run

RRR = "rrr"
"""In a run's `beyond`: the weight of RRR, which is told where the decoys are."""
RRR_BY_PROTOTYPES = "rrr_by_prototypes"
"""In a run's `beyond`: the weight of RRR that is told where the image's class has no support."""
PENALTIES = (RRR, RRR_BY_PROTOTYPES)


@lru_cache(maxsize=4)
def load_prepared(dataset: str, prototype: str = "mean") -> PreparedData:
    """Return a data set and its prototypes, loaded once in a process."""
    config = TrialConfig.from_dict({"dataset": dataset, "prototype": prototype})
    return prepare(config)


def train(run: Run, prepared: PreparedData, state: Path) -> TrialResult:
    """Train a run's model, resuming from `state` if that exists, and keep it there.

    Args:
        run: its `beyond` may name a weight of RRR, one of :data:`PENALTIES`, or one of
            :data:`CONTROLS`.
        prepared: data and prototypes.
        state: a file; see :func:`studies.evidence.runs.state_of`.
    """
    state.parent.mkdir(parents=True, exist_ok=True)
    config = run.config
    for penalty in run.beyond.keys() & set(PENALTIES):
        config = replace(config, lambda_mask_gradient=run.beyond[penalty])
        if penalty == RRR_BY_PROTOTYPES:
            prepared = masked_by_prototypes(prepared, config.resolution)
    for control in run.beyond.keys() & set(CONTROLS):
        prepared = controlled(prepared, config, control)

    def keep(report: EpochReport) -> None:
        report.save_state(state)

    return fit(config, keep, prepared=prepared, state=state if state.is_file() else None)


def evaluate_test(result: TrialResult) -> Evaluation:
    """Evaluate a model on the test split, on its device and in the precision of its training."""
    split = result.prepared.split("test", result.config.resolution, result.device)
    return result.evaluator.evaluate(split)


def masked_by_prototypes(prepared: PreparedData, resolution: int) -> PreparedData:
    """Return the data with masks that mark where the class of each training image has no support.

    Prototypes take the place of an annotation. The masks have the resolution of the model's input.
    """
    train = prepared.dataset.train
    off_support_CRR = prepared.off_support_mask((resolution, resolution)).bool()
    masks = off_support_CRR[torch.from_numpy(train.labels)].numpy()
    return prepared.with_splits(train=replace(train, masks=masks))
