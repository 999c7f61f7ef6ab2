"""The fused kernels on machines without a GPU: under Triton's interpreter, and through its compiler for Hopper.

In processes of their own, because the interpreter must be chosen before Triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels run on the GPU itself")
def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert "passed" in python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", TRITON_INTERPRET="1")


def test_kernels_compile_for_hopper() -> None:
    pytest.importorskip("triton")
    assert "swiglu" in python("-m", "tests.kernels.hopper")


def python(*arguments: str, **environment: str) -> str:
    """What Python prints, run in the repository with `environment` added."""
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize(("value", "reason"), [("0", "HRM_TEXT_KERNELS=0"), ("1", None)])
def test_option_switches_them(monkeypatch: pytest.MonkeyPatch, value: str, reason: str | None) -> None:
    pytest.importorskip("triton")
    from hrm_text.kernels.launch import why_off

    monkeypatch.setenv("HRM_TEXT_KERNELS", value)
    assert why_off() == reason
    monkeypatch.setenv("HRM_TEXT_KERNELS", "yes")
    with pytest.raises(ValueError, match="HRM_TEXT_KERNELS='yes': must be 0 or 1"):
        why_off()
