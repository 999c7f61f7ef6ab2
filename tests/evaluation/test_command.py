"""`hrm-text eval` as it is typed: what it refuses, and a run that is cut short and goes on."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hrm_text.evaluation.run import task_folder
from tests.evaluation.conftest import ROOT

COMMAND = [str(Path(sys.executable).with_name("hrm-text")), "eval"]
NANO_RUN = ["--model", "hrm-text-nano", "--tasks", "nano_word", "--", "--dtype", "float32"]


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def test_tasks_are_found() -> None:
    assert task_folder() == ROOT / "benchmarks/lm_eval"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "mmlu,gsm9k"], "tasks: 'gsm9k' is unknown; it must be one of mmlu, arc_challenge, drop, gsm8k"),
        (["--tasks", ","], "tasks: must name at least one of"),
        (["--engine", "tgi"], "engine: 'tgi' is unknown; it must be one of vllm, sglang"),
        (["--engine", "{absent}"], "{absent} is not installed in this environment"),
        (["--data-dir", "/nowhere"], "data-dir: /nowhere is not a folder"),
        (["--limit", "-1"], "limit: must be at least 1, or 0 for all rows, got -1"),
        (["--server", "http://127.0.0.1:9", "--tasks", "nano_word"], "no answer from the server at http://127.0.0.1:9"),
        (["--server", "http://127.0.0.1:9", "--", "--x"], "is running already, so --x would not reach it"),
        (["--server", "http://127.0.0.1:9", "--data-dir", "{rows}", "--tasks", "gsm8k"], "gsm8k_test.jsonl:1: field"),
        (["--server", "http://127.0.0.1:9", "--data-dir", "{rows}", "--tasks", "math"], "has no math_test.jsonl"),
        (["--out", "{rows}/file", "--server", "http://127.0.0.1:9"], "file cannot be written"),
        (["--out", "{rows}/other", "--server", "http://x"], "holds results of a run with model 'another'"),
    ],
)
def test_bad_input_is_one_line_and_status_1(arguments: list[str], message: str, tmp_path: Path) -> None:
    absent = "vllm" if _installed("sglang") else "sglang"
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps({"question": "x"}))
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.json").write_text(json.dumps({"model": "another"}))
    filled = [argument.format(absent=absent, rows=tmp_path) for argument in arguments]
    status, output = run("--model", "hrm-text-nano", "--out", str(tmp_path / "out"), *filled)
    assert status == 1
    (line,) = output.splitlines()
    assert line.startswith("eval: ") and message.format(absent=absent) in line


def _installed(engine: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(engine) is not None


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.skipif(not _installed("vllm"), reason="starts vLLM")
def test_a_run_whose_server_dies_keeps_its_answers_and_goes_on(tmp_path: Path) -> None:
    out, ledger = ["--out", str(tmp_path)], tmp_path / "nano_word.jsonl"
    running = subprocess.Popen([*COMMAND, *out, *NANO_RUN], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 600
    while not (ledger.exists() and ledger.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in psutil.Process(running.pid).children(recursive=True):
        process.kill()
    output = running.communicate(timeout=120)[0]
    assert running.returncode == 1, output
    error = output.splitlines()[-1]
    assert "nano_word: the vllm server died (exit status -9); see" in error and "goes on from there" in error
    kept = ledger.read_text()
    answers = kept.count("\n")
    assert 0 < answers < 600 and f"{answers} answers are kept" in error

    ledger.write_text(kept + '["half a li')  # as a power cut would leave it
    status, output = run(*out, "--limit", "40", *NANO_RUN)
    assert status == 0, output
    assert ledger.read_text().startswith(kept)
    report: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    (result,) = report["results"]
    assert (result["task"], result["rows"]) == ("nano_word", 40) and result["measured"] >= 95
    assert (tmp_path / "results.png").stat().st_size > 5000
    assert "nano_word" in output and "the plugin is active" in output
