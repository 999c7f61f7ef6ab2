"""The Triton kernels under Triton's interpreter: about 2 s a token, so the prompts are short."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

from hrm_text.spans import SPANS_OPTION
from tests.sglang.engine import FUSED_LOG, TOLERANCE, Engine, deviation, generate, prompt, worst_deviation
from tests.sglang.test_parallel_and_lora import LORA, check, make_adapters
from tests.vllm.engine import Ask

P = prompt(18)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["0", "1"])
def test_virtual_sequences_equal_the_oracle(tiny: str, reference: Any, tmp_path: Path, kernels: str) -> None:
    """Decode on SGLang's layers, and on the fused kernels."""
    env = {"TRITON_INTERPRET": "1", "HRM_TEXT_KERNELS": kernels}
    options: dict[str, Any] = {"attention_backend": "triton", "chunked_prefill_size": 8, "log_level": "info"}
    with Engine(env=env, log=tmp_path / "log", model_path=tiny, **options) as engine:
        # A batch of a span and a causal run, then spans with chunks and with a cache hit inside one.
        batch = [Ask(P, (0, 12), max_tokens=2), Ask(prompt(7, 1), (), max_tokens=2)]
        answers = engine.ask(batch)
        for ask, mine in zip(batch, answers, strict=True):
            assert deviation(reference, ask, mine) <= TOLERANCE
        if kernels == "1":  # without log-probs, a prompt's last state is all that is computed behind the last attention
            assert engine.call(tokens_alone, batch) == [mine[0].tokens for mine in answers]
        for spans in ((3, 9, 9, 14), (0, 12)):
            assert worst_deviation(reference, engine, [Ask(P, spans, max_tokens=2, score=True)]) <= TOLERANCE
    assert (FUSED_LOG in (tmp_path / "log").read_text()) == (kernels == "1")


def tokens_alone(engine: Any, asks: list[Ask]) -> list[tuple[int, ...]]:
    """What is emitted for `asks`, in one batch, without log-probs."""
    engine.flush_cache()
    params: list[dict[str, Any]] = [{"temperature": 0.0, "max_new_tokens": ask.max_tokens} for ask in asks]
    for each, ask in zip(params, asks, strict=True):
        each["custom_params"] = {SPANS_OPTION: list(ask.spans or ())}
    outputs = engine.generate(input_ids=[list(ask.prompt) for ask in asks], sampling_params=params)
    return [tuple(output["output_ids"]) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["csgmv", "triton"])
def test_lora_kernels_take_four_slices(tiny: str, reference: Any, tmp_path: Path, kernels: str) -> None:
    """csgmv is what SGLang chooses on a GPU."""
    adapters = make_adapters(tmp_path, tiny, reference)
    options = LORA | {"lora_backend": kernels, "max_loras_per_batch": 4, "lora_paths": adapters.paths}
    with Engine(env={"TRITON_INTERPRET": "1"}, model_path=tiny, **options) as engine:
        asks = [Ask(P, (0, 12), 2), Ask(P, (3, 9), 2), Ask(prompt(7, 1), (), 2, score=True), Ask(P[:9], (), 2)]
        names = [None, "full", "scaled", "sparse"]
        check(adapters, asks, names, engine.call(generate, asks, names))
