"""What every test shares: one thread, and hypothesis without deadlines."""

import torch
from hypothesis import settings

# Results are promised per number of threads, and idle cores are not: one thread is both the
# reproducible and, on a busy machine, the fast choice.
torch.set_num_threads(1)

settings.register_profile("batchcam", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("batchcam")
