"""Tests of the losses under DistributedDataParallel: two processes compared with one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.batchcam.losses import distributed_worker as worker

ROOT = Path(__file__).parents[3]
PROCESSES = 2

Found = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> list[Found]:
    """Return the losses and gradients that each of two processes computes."""
    folder = tmp_path_factory.mktemp("distributed")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    running = [
        subprocess.Popen(
            [sys.executable, worker.__file__, str(rank), str(PROCESSES), str(folder)],
            env=environment | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    printed = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, printed
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def _whole(name: str, part: slice = slice(None)) -> dict[str, Tensor]:
    """Return the loss and gradients of one process on the batch, or on a part of it."""
    model, images, labels, prototypes = worker.problem()
    loss = worker.loss_of(name, None)
    return worker.gradients(model, loss, images[part], labels[part], prototypes)


@pytest.mark.parametrize("name", ["prototype", "over processes"])
def test_two_processes_update_as_one_with_the_whole_batch(found: list[Found], name: str) -> None:
    expected = _whole(name)
    for each in found:
        for parameter, gradient in expected.items():
            if parameter != "loss":
                torch.testing.assert_close(each[name][parameter], gradient)
    assert expected["convolution.weight"].abs().max() > 1e-4


def test_the_loss_over_processes_is_that_of_the_whole_batch_on_each(found: list[Found]) -> None:
    for each in found:
        torch.testing.assert_close(each["over processes"]["loss"], _whole("per process")["loss"])


def test_the_prototype_loss_is_the_mean_over_processes(found: list[Found]) -> None:
    losses = torch.stack([each["prototype"]["loss"] for each in found])
    torch.testing.assert_close(losses.mean(), _whole("prototype")["loss"])


def test_without_a_group_class_means_are_of_each_process(found: list[Found]) -> None:
    half = worker.IMAGES // PROCESSES
    parts = [_whole("per process", slice(rank * half, (rank + 1) * half)) for rank in range(2)]
    for each, part in zip(found, parts, strict=True):
        torch.testing.assert_close(each["per process"]["loss"], part["loss"])
        for name in set(part) - {"loss"}:
            mean = (parts[0][name] + parts[1][name]) / 2
            torch.testing.assert_close(each["per process"][name], mean)
    whole = _whole("per process")
    assert not torch.allclose(
        found[0]["per process"]["convolution.weight"], whole["convolution.weight"], rtol=1e-3
    )
