"""Evaluation tests need the `eval` extra; those on the benchmarks' own rows need a folder of them."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("math_verify") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared rows: $HRM_TEXT_DATA, or shared/data beside this checkout."""
    folder = Path(os.environ.get("HRM_TEXT_DATA", ROOT.parent / "shared/data"))
    if not folder.is_dir():
        pytest.skip("no folder of benchmark rows: HRM_TEXT_DATA names one")
    return folder
