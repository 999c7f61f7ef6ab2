"""Which of vLLM's suites runs where."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Float32 at 1e-5 is a promise of the CPU kernels; a GPU has its own suite and yardstick."""
    if torch.cuda.is_available():
        skip = pytest.mark.skip(reason="compares CPU kernels; test_gpu.py is the suite for this machine")
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(skip)
