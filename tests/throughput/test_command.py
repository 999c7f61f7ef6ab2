"""`hrm-text bench` as it is typed: what it refuses, and a run on a real engine that goes on where it was cut short."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from hrm_text.cli import main; main()", "bench"]
# A compiled model takes a minute to start on a CPU; what is tested here is not its speed.
ENVIRONMENT = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "size: 'huge' is unknown; it must be one of full, short, smoke"),
        (["--engines", "tgi"], "engines: 'tgi' is unknown; it must be one of vllm-in-tree, vllm, sglang-in-tree"),
        (["--workloads", "chat-3"], "workloads: 'chat-3' is unknown; it must be one of single, chat-1"),
        (["--repeats", "-1"], "repeats: must be at least 1, or 0 for the size's own, got -1"),
        (["--data-dir", "/nowhere"], "data-dir: /nowhere is not a folder"),
        (["--vllm-python", "/nowhere"], "vllm-python: /nowhere has no vllm"),
        (["--workloads", "gsm8k"], "gsm8k: needs --data-dir, a folder with gsm8k_test.jsonl"),
        (["--workloads", "gsm8k", "--data-dir", "{folder}"], "has no gsm8k_test.jsonl"),
        (["--model", "{folder}"], "model: "),
        (["--size", "full", "--workloads", "long"], "long needs 3200 positions, the model has 1024"),
        (["--out", "{folder}/file"], "file cannot be written"),
        (["--out", "{folder}/other"], "holds results of a run with model 'another', not 'hrm-text-nano'"),
    ],
)
def test_bad_input_is_one_line_and_status_1(arguments: list[str], message: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.json").write_text(json.dumps({"model": "another"}))
    filled = [argument.format(folder=tmp_path) for argument in arguments]
    status, output = run("--engines", "transformers", "--out", str(tmp_path / "out"), *filled)
    assert status == 1
    (line,) = output.splitlines()
    assert line.startswith("bench: ") and message in line


@pytest.mark.cpu
@pytest.mark.slow
def test_a_run_is_cut_short_by_a_dying_server_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arguments = ["--engines", "vllm", "--workloads", "single,chat-1,chat-4", "--out", str(out)]
    first = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    records = out / "records"
    while not list(records.glob("*.json")):
        assert first.poll() is None
        time.sleep(0.05)
    # The command's children are the load generator and the server; the server is the one that serves.
    (server,) = [pid for pid in _children(first.pid) if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.killpg(server, signal.SIGKILL)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 1 and "bench: the vllm server died (exit status -9)" in said.splitlines()[-1]
    kept = {path: path.read_bytes() for path in records.glob("*.json")}

    status, said = run(*arguments)
    assert status == 0, said
    assert {path.name for path in records.glob("*.json")} == {
        f"vllm.{name}.0.json" for name in ("single", "chat-1", "chat-4")
    }
    assert all(path.read_bytes() == content for path, content in kept.items())
    report = json.loads((out / "results.json").read_text())
    for record in report["records"]:
        count = 8 if record["workload"] == "chat-4" else 2
        assert record["metrics"]["completed"] == count
        assert record["metrics"]["total_output_tokens"] == count * (32 if record["workload"] == "single" else 24)
        # Faster than memory or arithmetic allow would be a wrong floor, or a wrong clock.
        floor = report["floors"][record["workload"]]
        assert 1000 * floor["tpot"] < record["metrics"]["median_tpot_ms"] < 5000
        assert record["kv_tokens"] and record["memory_mib"] > 100 and record["start_seconds"] > 1
        assert record["command"].startswith("vllm bench serve --backend openai")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
