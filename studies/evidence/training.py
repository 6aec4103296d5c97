"""A run's model: trained, or gone on with, or taken as it was kept."""

import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.data.preprocessing import batches, to_device
from batchcam.devices import resolve_device
from batchcam.training.evaluate import Evaluation, evaluate
from batchcam.training.fit import EpochReport, Trainer, TrialResult, fit
from studies.baselines.rrr import train_epoch
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
    return prepare(TrialConfig(dataset=dataset, prototype=prototype))


def train(run: Run, prepared: PreparedData, state: Path) -> TrialResult:
    """Train a run's model, from where `state` left it, and keep it there.

    Args:
        run: its `beyond` may name a weight of RRR, one of :data:`PENALTIES`, or one of
            :data:`CONTROLS`.
        prepared: data and prototypes.
        state: a file; see :func:`studies.evidence.runs.state_of`.
    """
    state.parent.mkdir(parents=True, exist_ok=True)
    for penalty in run.beyond.keys() & set(PENALTIES):
        return _train_by_rrr(run, prepared, state, penalty)
    for control in run.beyond.keys() & set(CONTROLS):
        prepared = controlled(prepared, run.config, control)

    def keep(report: EpochReport) -> None:
        report.save_state(state)

    return fit(run.config, keep, prepared=prepared, state=state if state.is_file() else None)


def evaluate_test(result: TrialResult) -> Evaluation:
    """Evaluate a model on the test split, where it is and in the precision it was trained in."""
    prepared, device = result.prepared, next(result.model.parameters()).device
    images, labels = to_device(prepared.dataset.test, device)
    return evaluate(
        result.model,
        images,
        labels,
        prepared.prototypes("test", result.config.resolution).to(device),
        result.preprocess,
        prototype_index=prepared.prototype_index("test").to(device),
        cam=result.config.cam,
        precision=result.config.precision,
    )


def _masks(prepared: PreparedData, resolution: int, penalty: str) -> Tensor:
    """Return where RRR is told that training images are irrelevant, float32 `(N, R, R)`."""
    split, size = prepared.dataset.train, (resolution, resolution)
    if penalty == RRR_BY_PROTOTYPES:
        return prepared.off_support_mask(size)[torch.from_numpy(split.labels)]
    assert split.masks is not None
    return F.interpolate(torch.from_numpy(split.masks[:, None]).float(), size).squeeze(1)


def _train_by_rrr(run: Run, prepared: PreparedData, state: Path, penalty: str) -> TrialResult:
    """Train as :func:`batchcam.training.fit.fit` does, but by RRR, one of :data:`PENALTIES`."""
    split, config = prepared.dataset.train, run.config
    device = resolve_device(config.device)
    masks_NRR = _masks(prepared, config.resolution, penalty)
    together = (*to_device(split, device), masks_NRR.to(device))
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        trainer = Trainer(config, prepared, device)
        if state.is_file():
            trainer.load_state(state)
        while trainer.epoch < config.epochs:
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + trainer.epoch)
            order = torch.randperm(len(split), generator=generator).to(device)
            ready = (
                (trainer.preprocess(images), labels, masks)
                for images, labels, masks in batches(together, config.batch_size, order)
            )
            train_epoch(trainer.step, ready, run.beyond[penalty], config.precision)
            trainer.epoch += 1
            evaluation = trainer.validate()
            ceiling = prepared.ceiling(config.resolution, trainer.grid).mean().item()
            trainer.history.append(
                {
                    "epoch": trainer.epoch,
                    "val_accuracy": evaluation.accuracy,
                    "cam_ssim": evaluation.cam_ssim,
                    "cam_ssim_ceiling": ceiling,
                    "seconds": time.perf_counter() - started,
                }
            )
            trainer.save_state(state)
        return trainer.result(trainer.validate())
