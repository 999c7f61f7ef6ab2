"""The exactness suite in short on a GPU: Model Runner V2, CUDA graphs on, FLASH_ATTN and TRITON_ATTN.

FlashAttention has no float32, so bf16 is measured against the float32 oracle of the same weights, and
the in-tree model's own deviation, on requests it masks rightly (the whole prompt one span, nothing
cached or scored), is the yardstick.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hrm_text.oracle import load_reference, token_logprobs
from tests.conftest import make_checkpoint
from tests.vllm.engine import Answer, Ask, Engine
from tests.vllm.mixes import asks, deviation, true_spans
from tests.vllm.test_prefix_cache import CASES, P, prompt, reset_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

COMMON = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
GPU: dict[str, Any] = {
    "on_gpu": True,
    "enforce_eager": False,
    "block_size": 16,
    "gpu_memory_utilization": 0.1,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
FLOAT32_TOLERANCE = 2e-5
ENGINES: dict[str, dict[str, Any]] = {
    "triton float32": {"max_num_batched_tokens": 96, "attention_backend": "TRITON_ATTN"},
    "triton float32 drafts": {
        "max_num_batched_tokens": 96,
        "attention_backend": "TRITON_ATTN",
        "speculative_config": NGRAM,
    },
    "flash bf16": {"max_num_batched_tokens": 96, "dtype": "bfloat16"},
    "flash bf16 preemption": {"max_num_batched_tokens": 96, "dtype": "bfloat16", "num_gpu_blocks_override": 24},
    "flash bf16 drafts": {"max_num_batched_tokens": 96, "dtype": "bfloat16", "speculative_config": NGRAM},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("gpu"), "bfloat16", head_dim=64))


@pytest.fixture(scope="module")
def gpu_reference(checkpoint: str) -> Any:
    """Float32 arithmetic on the bf16 weights."""
    return load_reference(checkpoint)


def deviations(reference: Any, ask: Ask, answers: list[Answer]) -> list[float]:
    """|log-prob - oracle's| of every emitted token."""
    spans = true_spans(ask)
    return [
        abs(float(expected) - got)
        for answer in answers
        for expected, got in zip(
            token_logprobs(reference, ask.prompt + answer.tokens, spans)[len(ask.prompt) - 1 :],
            answer.logprobs,
            strict=True,
        )
    ]


@pytest.fixture(scope="module")
def yardstick(checkpoint: str, gpu_reference: Any) -> tuple[float, float]:
    """Mean and largest deviation of the in-tree bf16 model where its mask is right."""
    whole = [Ask(prompt(length, seed), None, 12) for seed in range(8) for length in (5, 33, 64, 90, 150)]
    with Engine(
        model=checkpoint, dtype="bfloat16", env={"VLLM_PLUGINS": ""}, **(GPU | {"attention_backend": "FLASH_ATTN"})
    ) as engine:
        values = [
            value
            for ask, answers in zip(whole, engine.ask(whole), strict=True)
            for value in deviations(gpu_reference, ask, answers)
        ]
    print(f"yardstick: in-tree bf16 mean {sum(values) / len(values):.2e} max {max(values):.2e}")
    return sum(values) / len(values), max(values)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, checkpoint: str) -> Iterator[tuple[Engine, bool]]:
    options = GPU | ENGINES[request.param]
    with Engine(model=checkpoint, **options) as running:
        yield running, options.get("dtype", "float32") == "bfloat16"


def limit(is_bf16: bool, yardstick: tuple[float, float]) -> float:
    return 1.5 * yardstick[1] if is_bf16 else FLOAT32_TOLERANCE


@COMMON
@given(batch=st.lists(asks(longest_span=96), min_size=1, max_size=6))
def test_mixes(
    engine: tuple[Engine, bool], gpu_reference: Any, yardstick: tuple[float, float], batch: list[Ask]
) -> None:
    running, is_bf16 = engine
    answers = running.ask(batch)
    worst = max(deviation(gpu_reference, ask, samples) for ask, samples in zip(batch, answers, strict=True))
    values = [v for ask, samples in zip(batch, answers, strict=True) for v in deviations(gpu_reference, ask, samples)]
    print(f"worst {worst:.2e} mean emitted {sum(values) / len(values):.2e}")
    assert worst <= limit(is_bf16, yardstick)
    if is_bf16 and len(values) > 30:
        assert sum(values) / len(values) <= 1.5 * yardstick[0]


def test_cache_hits(engine: tuple[Engine, bool], gpu_reference: Any, yardstick: tuple[float, float]) -> None:
    running, is_bf16 = engine
    for name, (first, second, _) in CASES.items():
        if any(end - start > 96 for start, end in true_spans(first) + true_spans(second)):
            continue
        running.call(reset_cache)
        for ask in (first, second):
            (answers,) = running.ask([ask])
            assert deviation(gpu_reference, ask, answers) <= limit(is_bf16, yardstick), name


def test_a_wrong_mask_would_show(checkpoint: str, gpu_reference: Any, yardstick: tuple[float, float]) -> None:
    """Negative control: the same weights with spans ignored are far outside the yardstick."""
    with Engine(model=checkpoint, dtype="bfloat16", sabotage="causal_everywhere", **GPU) as engine:
        ask = Ask(P, (0, 160), 8)
        (answers,) = engine.ask([ask])
    worst = deviation(gpu_reference, ask, answers)
    print(f"spans ignored: {worst:.2e}")
    assert worst > 3 * yardstick[1]
