"""The fused kernels on machines without a GPU: under Triton's interpreter, and through its compiler for Hopper.

In processes of their own, because the interpreter must be chosen before Triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hrm_text.kernels import launch

ROOT = Path(__file__).resolve().parent.parent


FILES = sorted(str(each.relative_to(ROOT)) for each in (ROOT / "tests/kernels").glob("test_*.py"))
assert len(FILES) >= 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels run on the GPU itself")
@pytest.mark.parametrize("file", FILES)
def test_kernels_under_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    assert "passed" in python("-m", "pytest", "-q", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")


def test_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    assert "swiglu" in python("-m", "tests.kernels.hopper")


def python(*arguments: str, **environment: str) -> str:
    """What Python prints, run in the repository with `environment` added."""
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize(
    ("value", "capability", "reason"),
    [
        ("0", 9, "HRM_TEXT_KERNELS=0"),
        ("1", 0, None),
        ("1", 9, None),
        (None, 9, None),
        (None, 8, "they were verified on Hopper GPUs only; HRM_TEXT_KERNELS=1 tries them here"),
        (None, 0, "they were verified on Hopper GPUs only; HRM_TEXT_KERNELS=1 tries them here"),
    ],
)
def test_where_they_run(
    monkeypatch: pytest.MonkeyPatch, value: str | None, capability: int, reason: str | None
) -> None:
    pytest.importorskip("triton")
    if value is None:
        monkeypatch.delenv("HRM_TEXT_KERNELS", raising=False)
    else:
        monkeypatch.setenv("HRM_TEXT_KERNELS", value)
    monkeypatch.setattr(launch, "capability", lambda device: capability)
    assert launch.why_off(torch.device("cpu")) == reason


def test_an_option_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRM_TEXT_KERNELS", "yes")
    with pytest.raises(ValueError, match="HRM_TEXT_KERNELS='yes': must be 0 or 1"):
        launch.check_option()


def test_without_triton_they_stay_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRM_TEXT_KERNELS", "1")
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert launch.why_off(torch.device("cpu")) == "Triton is not installed"
