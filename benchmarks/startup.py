"""How long `vllm serve` takes from its launch until it is healthy: cold, with dummy weights of the 1B.

    python -m benchmarks.startup --out startup.json

Cold: Triton's and vLLM's caches are in an empty folder of their own; what is warm is what pip leaves, Python's
bytecode. `--log` keeps the server's output, each line with the seconds since the launch. `--record` writes the Triton
kernels that were compiled, those that take longest first, in a start that compiles none ahead, in the form of
`hrm_vllm/recorded_kernels.txt`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Annotated

import typer

from hrm_text.throughput.dummy import dummy_model

CONFIG = Path(__file__).parent / "hrm-text-1b"
PORT = 8123
PATIENCE = 300  # seconds
SERVE = """
import sys
from pathlib import Path
record = sys.argv.pop(1)
if record:
    from hrm_text.kernels.recorded import record as record_to
    from hrm_vllm import kernels_ahead
    record_to(Path(record))
    kernels_ahead.begin_compiling = lambda config: None
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""


def launch(folder: Path, record: Path | None, log: Path) -> float:
    """Seconds until the server is healthy.

    Raises:
        RuntimeError: it ended, or is not healthy after `PATIENCE`.
    """
    model = dummy_model(str(CONFIG), folder)
    caches = {
        "TRITON_CACHE_DIR": folder / "triton",
        "VLLM_CACHE_ROOT": folder / "vllm",
        "XDG_CACHE_HOME": folder / "xdg",
    }
    environment = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"} | os.environ | {name: str(at) for name, at in caches.items()}
    arguments = ["serve", model, "--load-format", "dummy", "--port", str(PORT)]
    command = [sys.executable, "-c", SERVE, str(record or ""), *arguments]
    began = time.perf_counter()
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )

    def write_down() -> None:
        assert server.stdout is not None
        with log.open("w") as file:
            for line in server.stdout:
                file.write(f"{time.perf_counter() - began:6.2f} {line}")

    writer = threading.Thread(target=write_down, daemon=True)
    writer.start()
    try:
        while time.perf_counter() - began < PATIENCE and server.poll() is None:
            if healthy():
                return time.perf_counter() - began
            time.sleep(0.05)
        raise RuntimeError(f"the server is not healthy; its last words: {log.read_text()[-2000:]}")
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        writer.join(10)


def healthy() -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{PORT}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main(
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("startup.json"),
    log: Annotated[Path, typer.Option(help="Where the server's output goes.")] = Path("startup.log"),
    record: Annotated[Path | None, typer.Option(help="Where the list of Triton kernels goes.")] = None,
    repeats: int = 1,
) -> None:
    """Launch the server, each time with empty caches, and print how long it took."""
    seconds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="startup") as folder:
            raw = None if record is None else Path(folder) / "recorded"
            seconds.append(launch(Path(folder), raw, log))
            if record is not None and raw is not None:
                record.write_text(described(raw.read_text()))
        print(f"healthy after {seconds[-1]:.1f} s", flush=True)
        out.write_text(json.dumps({"seconds_to_healthy": seconds}))


def described(raw: str) -> str:
    """The file that the plugin reads."""
    from importlib.metadata import version

    from hrm_text.kernels.recorded import in_order

    made = f"# vLLM {version('vllm')}, Triton {version('triton')}: python -m benchmarks.startup --record FILE\n"
    return made + "".join(f"{kernel}\n" for kernel in in_order(raw))


if __name__ == "__main__":
    typer.run(main)
