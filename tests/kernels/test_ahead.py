"""Kernels compiled ahead are those that decode steps run, and their made-up requests leave no trace."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hrm_text.config import HrmTextShape
from hrm_text.kernels import (
    ahead,
    attention,
    attention_hopper,
    attention_many,
    first,
    gemm,
    linear,
    nvrtc,
    staged,
    streamed,
)
from hrm_text.kernels.ahead import begin_compiling, compile_ahead, run_empty
from hrm_text.kernels.attention import DecodeBatch
from hrm_text.kernels.decode import FusedDecode, kinds_of
from hrm_text.model import HrmTextBody
from hrm_text.plain import PlainLayers, rope_table
from hrm_text.plan import RecurrencePlan
from tests.kernels.conftest import DEVICE

PLAN = RecurrencePlan(1, 1, 1)
SHAPE = HrmTextShape(PLAN, 128, 128, 2, 64, 16, 4096, 10000.0, 1e-6, 1.0, False, True)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CONTEXT = 16
KERNELS: tuple[Any, ...] = (
    attention._decode,
    first._first,
    attention_many._decode_many,
    gemm._gemm,
    linear._in_registers,
    linear._on_tensor_cores,
)


class Step:
    """A decode batch with its caches.

    Args:
        requests: in it.
        ragged: whether its table is flat, as SGLang's.
    """

    def __init__(self, requests: int, ragged: bool) -> None:
        self.cache = torch.randn(PLAN.num_slots, 2, CONTEXT * requests, 1, 2, 64, device=DEVICE, dtype=DTYPE)
        table = torch.arange(CONTEXT * requests, dtype=torch.int32, device=DEVICE).view(requests, CONTEXT)
        starts = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE) * CONTEXT
        self.batch = DecodeBatch(
            positions=torch.full((requests,), CONTEXT - 1, device=DEVICE),
            write_slots=table[:, -1].long(),
            table=table.flatten() if ragged else table,
            row_starts=starts if ragged else None,
            lengths=None if ragged else torch.full((requests,), CONTEXT, dtype=torch.int32, device=DEVICE),
            page_size=1,
            cos_sin=rope_table(SHAPE).to(DEVICE),
        )

    def caches(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache[slot, 0], self.cache[slot, 1]


@pytest.fixture
def fused() -> FusedDecode:
    body = HrmTextBody(SHAPE, PlainLayers(), "model").to(DEVICE, DTYPE)
    for parameter in body.parameters():
        parameter.data.normal_(0, 0.05)
    return FusedDecode(body, torch.device(DEVICE))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("size", [1, 5, 17])
def test_caches_are_neither_read_nor_written(fused: FusedDecode, size: int, ragged: bool) -> None:
    step = Step(2, ragged)
    step.cache.fill_(float("nan"))
    with torch.inference_mode():
        result = run_empty(fused, torch.zeros(1, dtype=torch.int32, device=DEVICE), step.batch, step.caches, size)
    assert result.shape == (size, SHAPE.hidden_size)
    assert result.isfinite().all()
    assert step.cache.isnan().all()


@pytest.mark.skipif(DEVICE != "cuda", reason="an interpreter compiles nothing")
@pytest.mark.parametrize("ragged", [False, True])
def test_steps_compile_nothing_more(fused: FusedDecode, ragged: bool) -> None:
    def compiled() -> int:
        return sum(len(cache[0]) for kernel in KERNELS for cache in kernel.device_caches.values())

    before = compiled()
    step = Step(3, ragged)
    compile_ahead(fused, torch.zeros(1, dtype=torch.int32, device=DEVICE), step.batch, step.caches, 128)
    assert (there := compiled()) > before
    for requests in (1, 3, 8, 13, 16, 17, 40, 64, 65, 128):
        step = Step(requests, ragged)
        with torch.inference_mode():
            ids = torch.randint(SHAPE.vocab_size, (requests,), dtype=torch.int32, device=DEVICE)
            fused(ids, step.batch, step.caches)
        assert compiled() == there, requests


def test_what_is_begun_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the CUDA kernels, on a GPU that stands in for an H200."""
    plan = RecurrencePlan(1, 1, 1)
    shape = HrmTextShape(plan, 1536, 4096, 12, 128, 16, 4096, 10000.0, 1e-6, 1.0, False, True)
    with torch.device("meta"):
        body = HrmTextBody(shape, PlainLayers(), "model").to(torch.bfloat16)
    modules: tuple[Any, ...] = (staged, streamed, attention_hopper)
    compiled: set[tuple[str, Any]] = set()
    for module in modules:
        name = module.__name__
        monkeypatch.setattr(module, "code_for", lambda kind, name=name: compiled.add((name, kind)))
        monkeypatch.setattr(module, "DependentKernel", lambda *_, **__: None)
    for module in (nvrtc, ahead):
        monkeypatch.setattr(module, "capability", lambda device: 9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(streamed, "Streamed", lambda geometry: streamed.code_for(geometry))
    shutdown = ThreadPoolExecutor.shutdown
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", lambda self, wait=True: shutdown(self))
    begin_compiling(body)
    begun = compiled.copy()
    assert len({name for name, _ in begun}) == len(modules)
    compiled.clear()
    for module in modules:
        monkeypatch.setattr(module, "kernel_for", module.kernel_for.__wrapped__)
    device, (kinds, copied) = torch.device("cuda", 0), kinds_of(shape)
    assert staged.why_not(copied, torch.bfloat16, device) is None
    assert streamed.why_not(kinds, torch.bfloat16, device) is None
    assert attention_hopper.why_not(128, torch.bfloat16, device) is None
    assert begun == compiled


def test_nothing_is_begun_that_will_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    body = HrmTextBody(SHAPE, PlainLayers(), "model").to(DEVICE)
    for module in (staged, streamed, attention_hopper):
        monkeypatch.setattr(module, "code_for", lambda kind: pytest.fail("it is compiled"))
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda self, job: job())
    begin_compiling(body.float())
    monkeypatch.setattr(ahead, "capability", lambda device: 9)
    body.stage = range(1)
    begin_compiling(body.bfloat16())


def test_a_second_caller_waits_for_the_first() -> None:
    calls, begun, go = [], Event(), Event()

    @nvrtc.once
    def slow(argument: int) -> int:
        calls.append(argument)
        begun.set()
        assert go.wait(20)
        if argument == 2:
            raise KeyError(argument)
        return -argument

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow, 1)
        assert begun.wait(20)
        second = pool.submit(slow, 1)
        go.set()
        assert first.result() == second.result() == -1
    assert calls == [1]
    for _ in range(2):
        with pytest.raises(KeyError):
            slow(2)
    assert calls == [1, 2]
