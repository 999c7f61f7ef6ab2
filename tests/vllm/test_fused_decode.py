"""Decode steps on the fused kernels through vLLM's own path, on a CPU under Triton's interpreter.

`tests/vllm/gpu_layout.py` says what stands in for a GPU. A decode step takes seconds, so answers are short.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.vllm.engine import FUSED_LOG, Ask, Engine
from tests.vllm.mixes import TOLERANCE, deviation, worst_deviation
from tests.vllm.test_exactness import count_events, event_counts
from tests.vllm.test_prefix_cache import prompt

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

FUSED = {"HRM_TEXT_KERNELS": "1", "TRITON_INTERPRET": "1"}
PAGES: dict[str, Any] = {"block_size": 96, "gpu_layout": True, "env": FUSED}  # not a power of two
P = prompt(120)


@pytest.fixture(scope="module")
def engine(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("fused") / "log"
    with Engine(model=tiny, log=log, max_num_seqs=20, max_num_batched_tokens=400, **PAGES) as running:
        running.call(count_events)
        running.call(count_fused_steps)
        running.call(count_prompt_steps)
        yield running
        assert FUSED_LOG in log.read_text()


def count_fused_steps(llm: Any) -> None:
    """Watch the sizes of the batches that the fused kernels decode."""
    decoder, llm.fused_batches = decoder_of(llm), []
    recur = decoder.recur

    def counting(input_ids: torch.Tensor, positions: torch.Tensor) -> Any:
        result = recur(input_ids, positions)
        if result is not None:
            llm.fused_batches.append(len(input_ids))
        return result

    decoder.recur = counting


def count_prompt_steps(llm: Any) -> None:
    """Watch the sizes of the other steps, and which of them vLLM's layers run."""
    model = runner_of(llm).model
    prefiller, llm.prompt_steps = model.prefiller, []
    recur = prefiller.recur

    def counting(input_ids: torch.Tensor, positions: torch.Tensor) -> Any:
        result = recur(input_ids, positions)
        llm.prompt_steps.append((len(input_ids), result is not None))
        return result

    prefiller.recur = counting


def prompt_steps(llm: Any) -> list[tuple[int, bool]]:
    steps, llm.prompt_steps = llm.prompt_steps, []
    return steps


def decoder_of(llm: Any) -> Any:
    return runner_of(llm).model.decoder


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def fused_batches(llm: Any) -> list[int]:
    sizes, llm.fused_batches = llm.fused_batches, []
    return sizes


def test_chunks_and_cache_hits(engine: Engine, reference: Any) -> None:
    """A prompt in chunks beside others, decoded with them, and met again in the cache."""
    chunked = Ask(P, (0, 40, 60, 90), 3)
    batch = [Ask(prompt(110, seed), (0, 50 + seed), 4) for seed in range(3)] + [chunked]
    assert worst_deviation(reference, engine, batch) <= TOLERANCE
    assert engine.call(event_counts)["chunks"]
    assert engine.call(fused_batches) == [4, 4]
    assert engine.call(prompt_steps) == [(390, True), (63, True)]
    for again in engine.ask([chunked] * 3):
        assert again[0].cached == 96
        assert deviation(reference, chunked, again) <= TOLERANCE
    assert engine.call(fused_batches) == [3, 3]


@pytest.mark.parametrize("requests", [1, 17])
def test_sizes(engine: Engine, reference: Any, requests: int) -> None:
    """The kernels for few tokens, and those for more than they take."""
    engine.call(fused_batches)
    batch = [Ask(prompt(4 + seed % 3, seed), (0, 2), 2) for seed in range(requests)]
    assert worst_deviation(reference, engine, batch) <= TOLERANCE
    assert engine.call(fused_batches) == [requests]


def test_preemption(tiny: str, reference: Any) -> None:
    """Requests that grow out of their first page when only two more are free."""
    options = PAGES | {"block_size": 32, "max_model_len": 128}  # or the prompts take minutes
    with Engine(model=tiny, max_num_batched_tokens=400, num_gpu_blocks_override=7, **options) as engine:
        engine.call(count_events)
        engine.call(count_fused_steps)
        batch = [Ask(prompt(30, seed), (0, 20 + seed), 4) for seed in range(4)]
        assert worst_deviation(reference, engine, batch) <= TOLERANCE
        assert engine.call(event_counts)["preemptions"]
        assert engine.call(fused_batches) == [4, 4, 3]


def test_a_padded_batch(engine: Engine) -> None:
    """As a FULL graph runs it: rows behind the batch have no length, no slot, and positions of earlier steps."""
    plain, padded, cache_unchanged = engine.call(padded_step)
    assert plain.shape == (3, 64) and padded.shape == (5, 64)
    assert float((plain - padded[:3]).abs().max()) <= TOLERANCE  # other splits of the context
    assert bool(padded.isfinite().all())
    assert cache_unchanged


def padded_step(llm: Any) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Hidden states of a batch of three, alone and with two padding rows, and whether these left the cache alone."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context

    runner = runner_of(llm)
    layers = decoder_of(llm).layers

    def step(rows: int) -> torch.Tensor:
        metadata = SimpleNamespace(
            prefix_lm_decode=True,
            slot_mapping=torch.tensor([96 + 50, 2 * 96 + 10, 3 * 96, -1, -1])[:rows],
            block_table=torch.tensor([[1, 0], [2, 0], [3, 0], [0, 0], [0, 0]], dtype=torch.int32)[:rows],
            seq_lens=torch.tensor([51, 11, 1, 0, 0], dtype=torch.int32)[:rows],
        )
        by_layer = dict.fromkeys((layer.layer_name for layer in layers.values()), metadata)
        with (
            torch.inference_mode(),
            set_forward_context(by_layer, runner.vllm_config, cudagraph_runtime_mode=CUDAGraphMode.FULL),
        ):
            ids, positions = torch.tensor([20, 30, 40, 50, 60]), torch.tensor([50, 10, 0, 77, 200])
            return runner.model(ids[:rows], positions[:rows])

    plain = step(3)
    caches = [layer.kv_cache.clone() for layer in layers.values()]
    padded = step(5)
    pairs = zip(caches, layers.values(), strict=True)
    same = all(torch.allclose(old, layer.kv_cache, atol=TOLERANCE) for old, layer in pairs)
    return plain, padded, same


def test_batches_that_are_not_its_own(engine: Engine) -> None:
    """PIECEWISE graphs, dry runs and microbatches stay with vLLM's layers."""
    assert engine.call(taken) == {"decode": True, "piecewise": False, "dry run": False, "microbatches": False}


def taken(llm: Any) -> dict[str, bool]:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context

    runner, decoder = runner_of(llm), decoder_of(llm)
    names = [layer.layer_name for layer in decoder.layers.values()]

    def take(decode: bool, mode: CUDAGraphMode = CUDAGraphMode.NONE, microbatches: bool = False) -> bool:
        metadata = SimpleNamespace(
            prefix_lm_decode=decode,
            slot_mapping=torch.full((4,), -1),
            block_table=torch.zeros(4, 1, dtype=torch.int32),
            seq_lens=torch.ones(4, dtype=torch.int32),
        )
        by_layer: Any = dict.fromkeys(names, metadata)
        with (
            torch.inference_mode(),
            set_forward_context(
                [by_layer] if microbatches else by_layer, runner.vllm_config, cudagraph_runtime_mode=mode
            ),
        ):
            return decoder.recur(torch.full((4,), 20), torch.zeros(4, dtype=torch.long)) is not None

    return {
        "decode": take(True),
        "piecewise": take(True, CUDAGraphMode.PIECEWISE),
        "dry run": take(False),
        "microbatches": take(True, microbatches=True),
    }


def test_graphs_that_cannot_be_captured(engine: Engine, reference: Any) -> None:
    """Then steps run without, and the log says so."""
    assert "CUDA out of memory" in engine.call(capture_without_memory)
    assert worst_deviation(reference, engine, [Ask(prompt(6, 50), (0, 4), 1)]) <= TOLERANCE


def capture_without_memory(llm: Any) -> str:
    from unittest.mock import patch

    prefiller = runner_of(llm).model.prefiller
    with (
        patch("hrm_vllm.prefill_graphs.captured", side_effect=torch.OutOfMemoryError("CUDA out of memory")),
        patch("hrm_vllm.prefill.logger") as logger,
    ):
        prefiller.capture(torch.device("cpu"))
    assert prefiller.graphs is None
    return str(logger.warning.call_args)


REASONS = {
    "as it runs": None,
    "drafts": "speculative decoding, whose graphs verify several tokens a request",
    "piecewise": "cudagraph_mode=PIECEWISE",
    "LoRA": "LoRA",
    "replicas": "data parallelism",
    "batch invariance": "VLLM_BATCH_INVARIANT=1",
    "fp8": "a KV cache of fp8",
    "window": "a sliding window",
    "packed keys": "the attention backend CPU_ATTN",
}


def test_reasons(engine: Engine) -> None:
    assert engine.call(reasons) == REASONS


def reasons(llm: Any) -> dict[str, str | None]:
    """What `why_not` says of this engine, and of it with one thing changed."""
    from unittest.mock import patch

    from vllm import envs
    from vllm.config import CUDAGraphMode

    from hrm_vllm import decode

    config = runner_of(llm).vllm_config
    layers = list(decoder_of(llm).layers.values())
    fp8 = layers[0].kv_cache.to(torch.float8_e4m3fn)
    changes: dict[str, list[Any]] = {
        "as it runs": [],
        "drafts": [patch.object(config, "speculative_config", object())],
        "piecewise": [patch.object(config.compilation_config, "cudagraph_mode", CUDAGraphMode.PIECEWISE)],
        "LoRA": [patch.object(config, "lora_config", object())],
        "replicas": [patch.object(config.parallel_config, "data_parallel_size", 2)],
        "batch invariance": [patch.object(envs, "VLLM_BATCH_INVARIANT", True, create=True)],
        "fp8": [patch.object(layers[0], "kv_cache", fp8), patch.object(config.cache_config, "cache_dtype", "fp8")],
        "window": [patch.object(layers[-1], "sliding_window", 64)],
        "packed keys": [patch.object(decode, "BACKENDS", decode.BACKENDS[:2])],
    }
    found = {}
    for name, patches in changes.items():
        with contextlib.ExitStack() as stack:
            for each in patches:
                stack.enter_context(each)
            found[name] = decode.why_not(config, layers, torch.float32)
    return found


def test_what_is_prepared_in_the_background(engine: Engine) -> None:
    """Products of many tokens, only where steps will run on them and the model is in this process."""
    assert engine.call(prepared) == {"as it runs": 1, "LoRA": 0, "compiled": 0, "two GPUs": 0}


def prepared(llm: Any) -> dict[str, int]:
    """How often it begins, for this engine's scheduler and with one thing changed."""
    from unittest.mock import patch

    from vllm.config import CompilationMode

    from hrm_vllm.prefill import prepare_many_tokens

    config = runner_of(llm).vllm_config
    changes: dict[str, Any] = {
        "as it runs": contextlib.nullcontext(),
        "LoRA": patch.object(config, "lora_config", object()),
        "compiled": patch.object(config.compilation_config, "mode", CompilationMode.VLLM_COMPILE),
        "two GPUs": patch.object(config.parallel_config, "world_size", 2),
    }
    found = {}
    for name, change in changes.items():
        with change, patch("hrm_text.kernels.products.begin") as begin:
            prepare_many_tokens(config)
        found[name] = begin.call_count
    return found


def test_a_backend_that_they_do_not_know(tiny: str, reference: Any, tmp_path: Path) -> None:
    """The CPU's own: the engine says so once, and serves as without them."""
    log = tmp_path / "log"
    with Engine(model=tiny, env=FUSED, log=log) as engine:
        assert worst_deviation(reference, engine, [Ask(P[:20], (0, 12), 3), Ask(P[:7], (), 3)]) <= TOLERANCE
    lines = [line for line in log.read_text().splitlines() if "decode runs" in line]
    assert len(lines) == 1 and "vLLM's layers" in lines[0] and "the attention backend CPU_ATTN" in lines[0]
