"""The exactness suite in short on a GPU: Model Runner V2, CUDA graphs on, FLASH_ATTN and TRITON_ATTN.

`tests/yardstick.py` says what each dtype is compared with; FlashAttention has no float32 at all.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm_text.kernels import products
from hrm_text.oracle import load_reference
from hrm_vllm.sampler_kernels import top_k_top_p_calls
from tests.adapters import make_adapter, merged, scaled_adapter
from tests.conftest import WIDE, make_checkpoint
from tests.engines_together import log_of, together
from tests.vllm.engine import FUSED_LOG, Ask, Engine, generate
from tests.vllm.mixes import deviation, true_spans
from tests.vllm.test_parallel_and_lora import generate_with
from tests.vllm.test_prefix_cache import CASES, P, prompt, reset_cache
from tests.yardstick import Yardstick, emitted_by, emitted_deviations, measure, of_engine, serve_mixes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

BUDGET = 96
GPU: dict[str, Any] = {
    "on_gpu": True,
    "enforce_eager": False,
    "block_size": 16,
    "kv_cache_memory_bytes": 1 << 28,
    "gpu_memory_utilization": 0.04,
    # 24 for batches beyond the fused kernels for few tokens, and padded ones.
    "max_num_seqs": 24,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 48, 80]},
    "max_num_batched_tokens": BUDGET,
}
# The fused kernels are on where nothing says otherwise.
PLAIN: dict[str, Any] = {"env": {"HRM_TEXT_KERNELS": "0"}}
TRITON = {"attention_backend": "TRITON_ATTN"}
FLASH = {"attention_backend": "FLASH_ATTN", "dtype": "bfloat16"}
DRAFTS = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
}
TIGHT = {"num_gpu_blocks_override": 24}
IN_TREE: dict[str, Any] = {"env": {"VLLM_PLUGINS": ""}, "max_num_batched_tokens": 2048}
OURS: dict[str, dict[str, Any]] = {
    "triton float32": TRITON | PLAIN,
    "triton float32 fused": TRITON,
    "triton float32 drafts": TRITON | PLAIN | DRAFTS,
    "flash bf16": FLASH | PLAIN,
    "flash bf16 fused": FLASH,
    "flash bf16 preemption": FLASH | PLAIN | TIGHT,
    "flash bf16 fused preemption": FLASH | TIGHT,
    "flash bf16 drafts": FLASH | DRAFTS,
}
OTHERS: dict[str, dict[str, Any]] = {
    "loras bf16": FLASH | {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_num_batched_tokens": 160},
    "in-tree float32": TRITON | IN_TREE,
    "in-tree bf16": FLASH | IN_TREE,
    "spans ignored": TRITON | {"sabotage": "causal_everywhere", "max_num_batched_tokens": 256},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("gpu"), "bfloat16", **WIDE))


@pytest.fixture(scope="module")
def gpu_reference(checkpoint: str) -> Any:
    """Float32 arithmetic on the bf16 weights."""
    return load_reference(checkpoint)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the engines' logs, one file each."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def engines(checkpoint: str, logs: Path) -> Iterator[Mapping[str, Engine]]:
    makers = {name: partial(Engine, model=checkpoint, **(GPU | options)) for name, options in (OURS | OTHERS).items()}
    with together(makers, logs) as started:
        yield started


@pytest.fixture(scope="module")
def yardsticks(engines: Mapping[str, Engine], gpu_reference: Any) -> dict[str, Yardstick]:
    return measure(engines, gpu_reference)


@pytest.mark.parametrize("name", OURS)
def test_mixes(name: str, engines: Mapping[str, Engine], gpu_reference: Any, yardsticks: dict[str, Yardstick]) -> None:
    emitted, worst = serve_mixes(engines[name], gpu_reference, deviation, BUDGET)
    mean = sum(emitted) / len(emitted)
    print(f"\n{name}: {len(emitted)} tokens, mean {mean:.2e}, worst {worst:.2e}")
    yardstick = of_engine(name, yardsticks)
    assert mean <= 1.2 * yardstick.mean
    assert worst <= 2 * yardstick.largest


@pytest.mark.parametrize("name", [name for name in OURS if "drafts" not in name])
def test_cache_hits(
    name: str, engines: Mapping[str, Engine], gpu_reference: Any, yardsticks: dict[str, Yardstick]
) -> None:
    worst, hits = 0.0, 0
    for first, second, cached in CASES.values():
        if any(end - start > BUDGET for start, end in true_spans(first) + true_spans(second)):
            continue
        engines[name].call(reset_cache)
        engines[name].ask([first])
        (answers,) = engines[name].ask([second])
        hits += answers[0].cached > 0
        assert cached <= answers[0].cached <= cached + 16  # blocks are 16 tokens here and 32 there
        worst = max(worst, deviation(gpu_reference, second, answers))
    print(f"\n{name}: {hits} hits, worst {worst:.2e}")
    assert hits >= 2
    assert worst <= 2 * of_engine(name, yardsticks).largest


def test_inspecting_the_model_leaves_cuda_alone() -> None:
    """vLLM forks behind it, which a process with CUDA must not."""
    code = "import torch, hrm_vllm.model; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decode_replays_full_graphs(engines: Mapping[str, Engine]) -> None:
    """And steps with prompts have graphs too: PIECEWISE ones, or whole ones where all of it is our own kernels."""
    for name in OURS:
        uncompiled = name in ("flash bf16 fused", "flash bf16 fused preemption")
        assert engines[name].call(graph_mode) == ("FULL_DECODE_ONLY" if uncompiled else "FULL_AND_PIECEWISE"), name
        assert engines[name].call(prompts_in_graphs) == ([True, True, False] if uncompiled else None), name


def prompts_in_graphs(llm: Any) -> list[bool] | None:
    """Whether steps with a prompt ran in a graph of ours: a span, one with causal tokens behind it, one too large."""
    graphs = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.prefiller.graphs
    if graphs is None:
        return None
    replay, ran = graphs.replay, []

    def counting(*step: Any) -> Any:
        z_H = replay(*step)
        ran.append(z_H is not None)
        return z_H

    graphs.replay = counting
    for ask in (Ask(prompt(20, 5), (0, 20), 1), Ask(prompt(60, 6), (0, 20), 1), Ask(prompt(90, 7), (0, 90), 1)):
        generate(llm, [ask])
    graphs.replay = replay
    return ran


@pytest.mark.parametrize("name", [name for name in OURS if "fused" in name and "preemption" not in name])
def test_batches_in_padded_graphs(
    name: str, engines: Mapping[str, Engine], gpu_reference: Any, yardsticks: dict[str, Yardstick]
) -> None:
    emitted = []
    for count in (1, 2, 7, 8, 16, 20):
        batch = [Ask(prompt(20 + 3 * seed, seed), (0, 15 + seed), 12) for seed in range(count)]
        emitted += emitted_by(gpu_reference, engines[name], batch)
    measured, yardstick = Yardstick.of(emitted), of_engine(name, yardsticks)
    print(f"\n{name}: {measured}")
    assert measured.mean <= 1.2 * yardstick.mean
    assert measured.largest <= 2 * yardstick.largest


def test_the_fused_kernels_run_where_they_should(engines: Mapping[str, Engine], logs: Path) -> None:
    """From the capture of the first FULL graph on; drafts need other graphs, and say so."""
    for name in OURS:
        engines[name].ask([Ask(P[:9], (), 4)])
        log = log_of(logs, name)
        assert (FUSED_LOG in log) == ("fused" in name), name
        assert ("(weights staged in shared memory)" in log) == ("bf16 fused" in name), name
        assert ("not on the fused kernels: speculative decoding" in log) == (name == "flash bf16 drafts")


def test_loras_on_compiled_stacks(
    checkpoint: str,
    engines: Mapping[str, Engine],
    gpu_reference: Any,
    yardsticks: dict[str, Yardstick],
    logs: Path,
    tmp_path: Path,
) -> None:
    """With LoRA a GPU runs vLLM's layers, compiled, which a CPU does not. Adapters' products round as well."""
    full = make_adapter(tmp_path / "full", gpu_reference)
    scaled = scaled_adapter(tmp_path / "scaled", gpu_reference)
    models = {None: gpu_reference, str(full): merged(checkpoint, full), str(scaled): merged(checkpoint, scaled)}
    names = [None, str(full), str(scaled), str(full), str(scaled), None]
    batch = [Ask(prompt(50 + 20 * seed, seed), (0, 15 + 10 * seed), 12) for seed in range(len(names))]
    deviations: dict[bool, list[float]] = {True: [], False: []}
    for ask, name, answers in zip(batch, names, engines["loras bf16"].call(generate_with, batch, names), strict=True):
        for other, model in models.items():
            deviations[other == name] += emitted_deviations(model, ask.prompt, true_spans(ask), answers)
    own, others = Yardstick.of(deviations[True]), Yardstick.of(deviations[False])
    print(f"\nLoRA: {own}, against the other models {others}")
    assert "not on the fused kernels: LoRA" in log_of(logs, "loras bf16")
    assert engines["loras bf16"].call(graph_mode) == "FULL_AND_PIECEWISE"
    assert own.mean <= 2 * yardsticks["bf16"].mean
    assert own.largest <= 3 * yardsticks["bf16"].largest
    assert others.mean > 20 * yardsticks["bf16"].mean


def test_an_engine_with_every_default(
    checkpoint: str, gpu_reference: Any, yardsticks: dict[str, Yardstick], tmp_path: Path
) -> None:
    """Its cache sized by vLLM's memory profile, which captures graphs of its own, and all sizes of them."""
    options: dict[str, Any] = {"enforce_eager": False, "dtype": "bfloat16", "gpu_memory_utilization": 0.2}
    options["max_num_seqs"] = 16  # or 2,048 tokens of as many requests as the other engines have are a step's limit
    with Engine(model=checkpoint, on_gpu=True, log=tmp_path / "log", **options) as engine:
        emitted, quack = [], find_spec("quack") is not None
        assert engine.call(quack_begun)
        for count in (1, 3, 8, 12, 16):  # up to 1,600 tokens in a step, 2,262 in a graph, 3,240 outside
            batch = [Ask(prompt(150 + 7 * seed, seed), (0, 15 + 12 * seed), 8) for seed in range(count)]
            emitted += emitted_by(gpu_reference, engine, batch)
        assert engine.call(quack_runs) == quack
    assert "graphs of steps with prompts: 36, up to 2560 tokens" in (tmp_path / "log").read_text()
    measured, yardstick = Yardstick.of(emitted), yardsticks["bf16"]
    print(f"\ndefaults: {measured}")
    assert measured.mean <= 1.2 * yardstick.mean
    assert measured.largest <= 2 * yardstick.largest


def quack_begun(_: Any) -> bool:
    """Whether it is prepared before anybody has asked for it."""
    return products._begun.cache_info().currsize == 1


def quack_runs(llm: Any) -> bool:
    """Whether it has products of many tokens."""
    device = next(llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.parameters()).device
    many = products.products_of_many(torch.bfloat16, device)
    return many is not None and products.products_for(products.MANY_TOKENS, torch.bfloat16, device) is many


def graph_mode(llm: Any) -> str:
    return llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name


def test_the_warm_up_finds_top_k_and_top_p_compiled() -> None:
    """Which takes vLLM's sampler 14 s of a start otherwise, one kernel after the other."""
    from vllm.v1.sample.ops import topk_topp_triton as ops

    from hrm_vllm.compat import mask_top_k_top_p

    def compiled() -> int:
        kernels = (ops._topk_topp_kernel, ops._topp_sb_stats_kernel, ops._topp_sb_step_kernel, ops._topp_sb_mask_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    before = compiled()
    for call in top_k_top_p_calls(vocabulary=1024, most=256):
        call()
    assert (there := compiled()) > before
    for requests in (256, 2, 1):
        k, p = torch.full((requests,), 3, device="cuda"), torch.full((requests,), 0.5, device="cuda")
        logits = torch.randn(requests, 1024, device="cuda")
        kept = mask_top_k_top_p(logits, k.int(), p).isfinite().sum(-1)
        assert kept.min() >= 1 and kept.max() <= 3
        assert compiled() == there, requests


def test_a_wrong_mask_would_show(
    engines: Mapping[str, Engine], gpu_reference: Any, yardsticks: dict[str, Yardstick]
) -> None:
    """Negative control: the same weights with spans ignored are far outside the yardstick."""
    ask = Ask(P, (0, 160), 8)
    (answers,) = engines["spans ignored"].ask([ask])
    worst = deviation(gpu_reference, ask, answers)
    print(f"\nspans ignored: worst {worst:.2e}")
    assert worst > 3 * yardsticks["float32"].largest
