"""The kernels run on a GPU, or on a CPU under Triton's interpreter, which must be chosen before Triton is imported."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]  # tests/test_interpreted_kernels.py runs them
