"""`hrm-text doctor` as users run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu


def doctor(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = str(Path(sys.executable).with_name("hrm-text"))
    return subprocess.run(
        [command, "doctor", *arguments], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200", **env}
    )


def test_it_reports_what_would_be_served() -> None:
    result = doctor(VLLM_CPU_KVCACHE_SPACE="2")
    assert result.returncode == 0, result.stdout + result.stderr
    for expected in ("vLLM 0.3", "span-aligned scheduler", "CPU_ATTN", "bfloat16", "32,768", "about 65,536", "active"):
        assert expected in result.stdout
    assert "not active" not in result.stdout


def test_it_says_why_the_plugin_is_not_active() -> None:
    result = doctor(VLLM_PLUGINS="something_else")
    assert result.returncode == 1
    assert "not active" in result.stdout and "VLLM_PLUGINS" in result.stdout


def test_it_names_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = doctor(str(tmp_path))
    assert result.returncode == 1
    assert "llama" in result.stdout
