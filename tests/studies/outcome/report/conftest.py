"""Fixtures for the tests of reports: finished studies, made without training."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from batchcam.config import TrialConfig
from studies.engine.ledger import LEDGER, Ledger
from studies.outcome.report.importance import MIN_TRIALS
from studies.settings import StudySettings
from studies.space import SearchSpace

CLASSES = ("cat", "dog", "<b>bird</b>")
"""Names of classes; a page must escape the last one, which looks like HTML."""

LOSSES: tuple[dict[str, Any], ...] = (
    {"lambda_proto": 0.0, "lambda_batch": 0.0},
    {"lambda_proto": 0.5, "lambda_batch": 0.0, "metric": "l1"},
    {"lambda_proto": 0.0, "lambda_batch": 0.1, "metric": "ssim"},
    {"lambda_proto": 2.0, "lambda_batch": 0.3, "metric": "l2"},
)

MakeStudy = Callable[..., Path]


@pytest.fixture(scope="session")
def make_study(tmp_path_factory: pytest.TempPathFactory) -> MakeStudy:
    """Return a function that makes a study with bundles; its last trial has failed.

    Accuracy depends on the learning rate. SSIM is high if the loss compares CAMs.
    """

    # By default too few trials for the importance of parameters, which takes seconds.
    def make(
        trials: int = MIN_TRIALS - 1, *, bundles: bool = True, confirmed: bool = False
    ) -> Path:
        space = SearchSpace(backbones=("simple_cnn", "resnet18"))
        settings = StudySettings(
            study="made", out=tmp_path_factory.mktemp("study"), num_trials=trials, space=space
        )
        settings = replace(settings.begun(), key="abcd")
        settings.folder.mkdir()
        settings.save()
        ledger = Ledger(settings.folder / LEDGER)
        draw = np.random.default_rng(0)
        for number in range(trials):
            trial = f"abcd-{number}"
            rate = float(10 ** draw.uniform(-3, -2))
            params = LOSSES[number % 4] | {
                "number": number,
                "trial_id": trial,
                "backbone": space.backbones[number % 3 == 0],
                "resolution": 28,
                "output_stride": None,
                "lambda_class": float(draw.uniform(0.5, 2)),
                "learning_rate": rate,
                "weight_decay": 0.01,
            }
            ledger.propose(params)
            if number == trials - 1:
                ledger.end(number, "failed", "ValueError: <script>alert(1)</script>")
                continue
            stopped = number % 5 == 3
            for epoch in range(1, 3 if stopped else 5):
                ledger.report(number, _metrics(epoch, rate, number % 4 != 0))
            ledger.end(number, "stopped" if stopped else "completed")
            folder = settings.folder / "checkpoints" / trial
            folder.mkdir(parents=True)
            pixels = draw.integers(0, 255, (2 * 28, 3 * 28, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / "cams.png")
        chosen = {"accuracy": 1, "ssim": 2, "knee": 2, "baseline": 0} if bundles else {}
        for name, number in chosen.items():
            _bundle(settings.folder / "best" / name, f"abcd-{number}", LOSSES[number], confirmed)
        return settings.folder

    return make


def _metrics(epoch: int, rate: float, explained: bool) -> dict[str, float]:
    return {
        "epoch": epoch,
        "val_accuracy": 0.9 + 0.02 * epoch - abs(np.log10(rate) + 2.5) * 0.03,
        "cam_ssim": 0.2 * epoch + 0.1 if explained else 0.05,
        "cam_ssim_ceiling": 0.99,
        "cam_ssim_sample": 0.5,
        "images_per_second": 1000.0 + 100 * epoch,
        "seconds": 30.0,
        "loss": float("nan"),  # JSON cannot represent NaN.
    }


def _bundle(folder: Path, trial: str, loss: dict[str, Any], confirmed: bool) -> None:
    folder.mkdir(parents=True)
    TrialConfig.from_dict(TrialConfig().as_dict() | loss).to_yaml(folder / "config.yaml")
    interval = {"mean": 0.95, "low": 0.94, "high": 0.96}
    metrics: dict[str, Any] = {
        "trial_id": trial,
        "val_accuracy": 0.95 if trial != "abcd-0" else 0.96,
        "test_accuracy": 0.94,
        "cam_ssim": 0.9,
        "cam_ssim_ceiling": 0.99,
        "cam_ssim_per_class": dict.fromkeys(CLASSES, 0.9),
        "cam_ssim_ceiling_per_class": dict.fromkeys(CLASSES, 0.99),
        "val_images_per_class": dict.fromkeys(CLASSES, 100),
        "val_errors": {"cat": {"dog": 7, "<b>bird</b>": 1}, "dog": {"cat": 2}, "<b>bird</b>": {}},
        "parameters": 96554,
        "epochs": 4,
        "seconds": 120.0,
        "device": "cpu",
        "dataset_sha256": "0123456789abcdef" * 4,
        "git_commit": "c0ffee",
        "versions": {"python": "3.11"},
        "command": "python studies/bcpl_sweep.py --study made",
    }
    if confirmed:
        metrics["confirmed"] = {
            "seeds": [1000, 1001],
            "val_accuracy": interval,
            "cam_ssim": interval,
        }
    (folder / "metrics.json").write_text(json.dumps(metrics))
