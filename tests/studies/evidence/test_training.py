"""Check that a run's model is trained once, and resumes after an interruption."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import to_device
from batchcam.prototypes import class_prototypes
from batchcam.training import fit as batchcam_train
from batchcam.training.step import TrainingStep
from studies.evidence.runs import Run
from studies.evidence.training import RRR, RRR_BY_PROTOTYPES, train


@pytest.mark.parametrize(
    "beyond",
    [{}, {RRR: 1.0}, {RRR_BY_PROTOTYPES: 1.0}],
    ids=["own loss", "RRR", "RRR by prototypes"],
)
def test_a_run_that_is_cut_goes_on_to_the_same_model(
    beyond: dict[str, float],
    small: dict[str, ImageData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = small["decoy_mnist"]
    data = replace(data, train=data.train.take(np.arange(96)))
    if RRR not in beyond:  # The other losses must work without masks.
        data = replace(data, train=replace(data.train, masks=None))
    train_prototypes, validation_prototypes = (
        class_prototypes(*to_device(split, torch.device("cpu")), 10)
        for split in (data.train, data.validation)
    )
    prepared = PreparedData(data, train_prototypes, validation_prototypes)
    config = TrialConfig(dataset="decoy_mnist", epochs=2, batch_size=32, device="cpu")
    run = Run(study="s", method="m", stage="final", config=config, beyond=beyond)
    whole = train(run, prepared, tmp_path / "whole.pt")

    kept = batchcam_train.Trainer.save_state
    saved: list[Path] = []

    def cut(trainer: batchcam_train.Trainer, path: Path) -> None:
        kept(trainer, path)
        saved.append(path)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(batchcam_train.Trainer, "save_state", cut)
    with pytest.raises(KeyboardInterrupt):
        train(run, prepared, tmp_path / "cut.pt")
    resumed = train(run, prepared, tmp_path / "cut.pt")
    assert len(saved) == 2
    again = train(run, prepared, tmp_path / "cut.pt")  # Trains nothing: the run is finished.
    assert len(saved) == 2
    for other in (resumed, again):
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], value, rtol=0, atol=0)
        assert other.metrics["val_accuracy"] == whole.metrics["val_accuracy"]


def test_rrr_by_prototypes_is_told_where_each_image_s_class_has_no_support(
    small: dict[str, ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small["decoy_mnist"]
    images, labels = to_device(data.train, torch.device("cpu"))
    prototypes = class_prototypes(images, labels, 10)
    prepared = PreparedData(data, prototypes, prototypes)
    told: list[Tensor] = []
    step = TrainingStep.__call__

    def record(self: TrainingStep, *tensors: Tensor) -> dict[str, Tensor]:
        *_, labels_N, _, masks_NRR = tensors
        told.append(torch.cat((labels_N[:, None, None].expand(-1, 1, 28), masks_NRR), dim=1))
        return step(self, *tensors)

    monkeypatch.setattr(TrainingStep, "__call__", record)
    config = TrialConfig(dataset="decoy_mnist", epochs=1, batch_size=64, device="cpu")
    for beyond in ({RRR_BY_PROTOTYPES: 1.0}, {RRR: 1.0}):
        run = Run(study="s", method="m", stage="final", config=config, beyond=beyond)
        train(run, prepared, tmp_path / f"{next(iter(beyond))}.pt")
    half = len(told) // 2
    off_support = prepared.off_support_mask((28, 28))
    for by_prototypes, annotated in zip(told[:half], told[half:], strict=True):
        labels = by_prototypes[:, 0, 0].long()
        torch.testing.assert_close(by_prototypes[:, 1:], off_support[labels], rtol=0, atol=0)
        assert torch.equal(labels, annotated[:, 0, 0].long())
        assert not torch.equal(annotated[:, 1:], by_prototypes[:, 1:])
