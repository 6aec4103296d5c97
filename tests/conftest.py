"""What every test shares: one thread, hypothesis without deadlines, one Ray cluster at a time."""

import pytest
import torch
from hypothesis import settings

# Results are promised per number of threads, and idle cores are not: one thread is both the
# reproducible and, on a busy machine, the fast choice.
torch.set_num_threads(1)

settings.register_profile("batchcam", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("batchcam")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests that start Ray to one process, where pytest runs in several."""
    for item in items:
        room = item.path.relative_to(item.config.rootpath).parts[1]
        if room in ("studies", "cluster"):
            item.add_marker(pytest.mark.xdist_group("ray"))
