"""Kernels that a start is known to ask for: what was recorded is what Triton asks for, and is found compiled."""

import ast
import importlib.util
import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.kernels import recorded
from hrm_text.kernels.recorded import Recorded, compile_in_processes, constant, in_order, read, record

pytest.importorskip("triton")
pytest.importorskip("vllm")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hrm_vllm import kernels_ahead

KERNELS = read(kernels_ahead.RECORD)
OURS = [kernel for kernel in KERNELS if kernel.kernel.startswith("hrm_text.")]


class Hopper:
    """What Triton asks a GPU's driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's, empty, for a GPU that is not there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(knobs.compilation, "listener", None)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    monkeypatch.setattr(driver, "_active", Hopper())
    return tmp_path / "cache"


def ask_for_gate() -> bool:
    """As a first launch does for one of our kernels, without launching; whether Triton finds it in its cache."""
    from hrm_text.kernels.pointwise import _gate

    _gate.device_caches.clear()  # of this process
    found: list[bool] = []
    former = knobs.compilation.listener

    def listener(*, cache_hit: bool, **more: Any) -> None:
        found.append(cache_hit)
        if former is not None:
            former(cache_hit=cache_hit, **more)

    knobs.compilation.listener = listener
    values = torch.zeros(8, 4, 32, dtype=torch.bfloat16)
    options = {"WIDTH": 32, "WIDE": 32, "SCALE": False, "ROWS": 1, "PDL": True, "num_warps": 2, "launch_pdl": True}
    _gate.warmup(values, None, values[0], 8, grid=(1,), **options)
    knobs.compilation.listener = former
    return found == [True]


@pytest.mark.usefixtures("cache")
def test_what_is_recorded_is_found_compiled(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the very key that Triton looks for: anything else would be compiled twice, and no start faster."""
    record(tmp_path / "record")
    assert not ask_for_gate()
    (kernel,) = in_order((tmp_path / "record").read_text())
    assert kernel.kernel == "hrm_text.kernels.pointwise:_gate" and set(kernel.options) == {
        "num_warps=2",
        "launch_pdl=True",
    }
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another"))
    assert not ask_for_gate()  # there is nothing in it
    for written in (kernel, Recorded.parse(str(kernel))):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / f"third{written is kernel}"))
        written.compile()
        assert ask_for_gate()


def test_processes_leave_them_in_the_cache(cache: Path, tmp_path: Path) -> None:
    """And a record that does not fit harms nobody."""
    record(tmp_path / "record")
    ask_for_gate()
    (kernel,) = in_order((tmp_path / "record").read_text())
    for each in sorted(cache.rglob("*"), reverse=True):
        each.unlink() if each.is_file() else each.rmdir()
    wrong = [
        Recorded("no.such.module:kernel", (), ("i32",)),
        Recorded(kernel.kernel, kernel.options, kernel.arguments[1:]),
    ]
    processes = compile_in_processes([*wrong, kernel], 2)
    assert len(processes) == 2
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert ask_for_gate()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kernel", OURS, ids=lambda kernel: kernel.kernel.partition(":")[2])
def test_ours_compile_as_recorded(kernel: Recorded) -> None:
    assert kernel.compile().metadata.num_warps in (1, 2, 4, 8)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.kernel.partition(":")[2])
def test_the_installed_engine_has_them(kernel: Recorded) -> None:
    """With as many arguments: a newer engine's are to be recorded anew. By the source, for vLLM without a GPU leaves
    Triton out."""
    module, _, name = kernel.kernel.partition(":")
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    functions = [
        node for node in ast.walk(ast.parse(Path(found.origin).read_text())) if isinstance(node, ast.FunctionDef)
    ]
    (function,) = [node for node in functions if node.name == name]
    assert len(function.args.args) == len(kernel.arguments)


TYPES = st.sampled_from(["i32", "*bf16:16", "fp32", "i64:", "*i32:16", "u8", "True:"])
CONSTANTS = st.one_of(st.integers(), st.booleans(), st.none(), st.sampled_from(["'int32'", "-inf", "inf"])).map(str)


@given(
    arguments=st.lists(TYPES | CONSTANTS),
    options=st.sampled_from([(), ("num_warps=8",), ("maxnreg=96", "launch_pdl=True")]),
)
def test_lines_say_all(arguments: list[str], options: tuple[str, ...]) -> None:
    kernel = Recorded("some.module:kernel", options, tuple(arguments))
    assert Recorded.parse(str(kernel)) == kernel
    for argument in arguments:
        what = argument.partition(":")[0]
        if recorded.TYPE.fullmatch(what) is None:
            assert str(constant(what)) == what.strip("'")


@pytest.mark.parametrize("line", ["", "module:kernel", "module | i32", "module:kernel 8 | i32"])
def test_a_line_that_is_no_kernel(line: str) -> None:
    with pytest.raises(ValueError, match="not a recorded kernel"):
        Recorded.parse(line)


def test_the_longest_come_first() -> None:
    lines = ["0.1 m:a | i32", "2.0 m:b | i32", "0.3 m:a | i32:16", "0.4 m:a | i32"]
    assert [str(kernel) for kernel in in_order("\n".join(lines))] == ["m:b | i32", "m:a | i32", "m:a | i32:16"]


@pytest.mark.parametrize(
    ("method", "warm", "initialized", "begun"),
    [
        ("fork", True, False, True),
        ("spawn", True, False, False),
        ("fork", False, False, False),
        ("fork", True, True, False),
    ],
)
def test_when_they_are_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch, method: str, warm: bool, initialized: bool, begun: bool
) -> None:
    """Where vLLM forks as well, and its warm-up would compile them."""
    calls: list[int] = []
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", method)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(kernels_ahead, "compile_in_processes", lambda kernels, processes: calls.append(len(kernels)))
    config: Any = SimpleNamespace(kernel_config=SimpleNamespace(enable_jit_warmup=warm))
    kernels_ahead.begin_compiling(config)
    assert calls == ([len(KERNELS)] if begun else [])


def test_a_daemonic_process_starts_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have no processes, and an engine in it has to start all the same."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    config: Any = SimpleNamespace(kernel_config=SimpleNamespace(enable_jit_warmup=True))
    process = multiprocessing.get_context("fork").Process(
        target=kernels_ahead.begin_compiling, args=(config,), daemon=True
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_system_without_room_starts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise BlockingIOError("no room for one more process")

    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setattr(kernels_ahead, "compile_in_processes", full)
    config: Any = SimpleNamespace(kernel_config=SimpleNamespace(enable_jit_warmup=True))
    kernels_ahead.begin_compiling(config)


def test_a_specialization_as_triton_writes_it() -> None:
    said = {
        "signature": {"x": "*bf16", "n": "i32", "eps": "fp32", "dtype": "constexpr", "flag": "constexpr"},
        "constant_keys": [[3], [4]],
        "constant_vals": ["int32", True],
        "attrs_keys": [[0], [1]],
        "attrs_vals": [[["tt.divisibility", 16]], []],
        "options": {"num_warps": 8, "num_stages": 3, "num_ctas": 1, "maxnreg": None, "launch_pdl": False},
    }
    kernel = Recorded.of("m", "k", json.dumps(said))
    assert str(kernel) == "m:k num_warps=8 | *bf16:16 i32: fp32 'int32' True"
