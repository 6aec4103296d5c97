"""Check that pytorch-grad-cam beside the loss returns CAMs and does not change the step."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batchcam.models import SimpleCNN
from studies.baselines.hookable_model import HookableModel

library = pytest.importorskip(
    "studies.baselines.library", reason="the extra `benchmarks` is not installed"
)


def test_a_step_is_one_of_cross_entropy_with_cams_beside_it() -> None:
    torch.manual_seed(0)
    model = HookableModel(SimpleCNN())
    plain = copy.deepcopy(model)
    x, labels = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 2])
    loss, maps = library.training_step(
        model, torch.optim.SGD(model.parameters(), lr=0.1), x, labels
    )

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = F.cross_entropy(plain(x), labels)
    torch.autograd.backward(expected)
    optimizer.step()
    torch.testing.assert_close(loss, expected.detach())
    for theirs, ours in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(theirs, ours)
    assert model.training
    assert not model.hook_point._forward_hooks

    # The maps are only for viewing: NumPy arrays, without an autograd graph.
    assert isinstance(maps, np.ndarray)
    assert maps.shape == (4, 28, 28)
    assert maps.min() >= 0
    assert maps.max() <= 1
