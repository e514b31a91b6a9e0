"""One thread and one hypothesis profile for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile(
    "minialign", deadline=None, derandomize=True, database=None, print_blob=True
)
settings.load_profile("minialign")
