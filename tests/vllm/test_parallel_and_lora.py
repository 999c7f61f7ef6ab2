"""Pipeline and tensor parallelism and LoRA, against the oracle."""

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hrm_vllm.lora import LARGEST_ID
from tests.adapters import make_adapter, merged, scaled_adapter
from tests.vllm.engine import Answer, Ask, Engine
from tests.vllm.mixes import TOLERANCE, deviation
from tests.vllm.test_prefix_cache import prompt
from tests.vllm.test_stacks import COMPILED, needs_compiler, seen_as_compiled

pytestmark = pytest.mark.cpu

ASKS = [
    Ask(prompt(120), (0, 50, 60, 110), 8),
    Ask(prompt(60, seed=2), None, 8),
    Ask(prompt(90, seed=3), (), 8, score=True),
]
RANK = 8


def test_pipeline_stages(tiny: str, reference: Any) -> None:
    """Each stage holds the KV slots of its own steps only, so two stages hold twice the tokens."""
    with Engine(model=tiny, pipeline_parallel_size=2, max_num_batched_tokens=96) as engine:
        for ask, answers in zip(ASKS, engine.ask(ASKS), strict=True):
            assert deviation(reference, ask, answers) <= TOLERANCE
        # Again, from the prefix cache.
        answers = engine.ask([ASKS[0]])[0]
        assert answers[0].cached > 0
        assert deviation(reference, ASKS[0], answers) <= TOLERANCE
        assert engine.call(pool_tokens) > 1.9 * _pool_of_one(tiny)


def test_tensor_parallel(tiny: str, reference: Any) -> None:
    with Engine(model=tiny, tensor_parallel_size=2, max_num_batched_tokens=96) as engine:
        for ask, answers in zip(ASKS, engine.ask(ASKS), strict=True):
            assert deviation(reference, ask, answers) <= TOLERANCE


@pytest.mark.parametrize("kind", ["pipeline", "tensor"])
@pytest.mark.slow
@needs_compiler
def test_compiled_stacks_of_several_ranks(tiny: str, reference: Any, kind: str) -> None:
    """What a GPU does with several ranks unless it is told otherwise: its fused kernels are for one."""
    options = {**COMPILED, f"{kind}_parallel_size": 2}
    with Engine(model=tiny, max_num_batched_tokens=96, **options) as engine:
        for ask, answers in zip(ASKS, engine.ask(ASKS), strict=True):
            assert deviation(reference, ask, answers) <= TOLERANCE
        assert engine.call(seen_as_compiled)


def pool_tokens(llm: Any) -> int:
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def _pool_of_one(tiny: str) -> int:
    with Engine(model=tiny, max_num_batched_tokens=96) as engine:
        return engine.call(pool_tokens)


def generate_with(
    llm: Any, asks: list[Ask], adapters: list[str | None], number: int | None = None
) -> list[list[Answer]]:
    """Serve `asks` in one batch; `adapters` are the folders of each one's adapter, None for the base model.

    Args:
        number: id of all adapters, None for one by its path.
    """
    from vllm.lora.request import LoRARequest

    from tests.vllm.engine import generate

    def request(path: str) -> LoRARequest:
        return LoRARequest(path, number or 1 + zlib.crc32(path.encode()) % LARGEST_ID, path)

    requests = [path and request(path) for path in adapters]
    return generate(llm, asks, requests)


@pytest.mark.parametrize("ranks", [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_lora_equals_merged_weights(tiny: str, reference: Any, tmp_path: Path, ranks: dict[str, Any]) -> None:
    """One adapter, then several and the base model in a batch, then the same from a prefix cache that they share."""
    full = make_adapter(tmp_path / "full", reference, RANK)
    scaled = scaled_adapter(tmp_path / "scaled", reference)
    models = {str(full): merged(tiny, full), None: reference, str(scaled): merged(tiny, scaled)}
    asks = [ASKS[0], ASKS[1], ASKS[2], ASKS[1], Ask(prompt(70, seed=9), (0, 30), 8)]
    mixed = [None, str(full), str(scaled), str(scaled), str(full)]
    options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    with Engine(model=tiny, max_num_batched_tokens=160, **options, **ranks) as engine:
        for names in (*([name] * len(asks) for name in models), mixed, mixed[::-1], mixed[::-1]):
            served = engine.call(generate_with, asks, names)
            for ask, name, answers in zip(asks, names, served, strict=True):
                for other, model in models.items():
                    found = deviation(model, ask, answers)
                    assert found <= TOLERANCE if other == name else found > 100 * TOLERANCE, (name, other, found)
        assert served[0][0].cached > 0


def load(llm: Any, adapter: str, number: int = 999) -> bool:
    from vllm.lora.request import LoRARequest

    return bool(llm.llm_engine.add_lora(LoRARequest("early", number, adapter)))


def test_the_largest_id_is_what_the_runner_for_gpus_keeps() -> None:
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.gpu.lora_utils import LoraState

    state = LoraState(max_num_reqs=1)
    state.add_request("largest", 0, LoRARequest("largest", LARGEST_ID, "there"))
    assert state.lora_ids[0] == LARGEST_ID
    with pytest.raises(OverflowError):
        state.add_request("larger", 0, LoRARequest("larger", LARGEST_ID + 1, "there"))


def test_an_adapter_that_does_not_fit_is_refused_and_the_engine_goes_on(
    tiny: str, reference: Any, tmp_path: Path
) -> None:
    """Left to vLLM, a wrong A is served, a tensor without a place dropped, and a wrong B ends the engine."""
    good = make_adapter(tmp_path / "good", reference, RANK)
    down = "base_model.model.model.H_module.layers.1.mlp.down_proj.lora_"
    changes = {
        "has shape \\(8, 64\\)": {f"{down}A.weight": torch.zeros(8, 64)},
        "has shape \\(96, 8\\)": {f"{down}B.weight": torch.zeros(96, 8)},
        "layer 9 is out of range": {f"{down}A.weight".replace("layers.1", "layers.9"): torch.zeros(8, 96)},
        "LM head": {"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 64)},
    }
    faults = {str(make_adapter(tmp_path / "large", reference, 64)): "rank is 64; the limit is 8"}
    faults[str(tmp_path / "nowhere")] = "no adapter can be read in .*nowhere"
    for number, (message, tensors) in enumerate(changes.items()):
        folder = make_adapter(tmp_path / str(number), reference, RANK)
        save_file(load_file(folder / "adapter_model.safetensors") | tensors, folder / "adapter_model.safetensors")
        faults[str(folder)] = message
    with Engine(model=tiny, enable_lora=True, max_lora_rank=RANK, max_num_batched_tokens=160) as engine:
        for path, message in faults.items():
            with pytest.raises(ValueError, match=f"LoRA adapter .*: .*{message}"):
                engine.call(generate_with, ASKS[1:2], [path])
            with pytest.raises(ValueError, match=f"LoRA adapter 'early': .*{message}"):
                engine.call(load, path)
        message = f"lora_int_id: must be at most {LARGEST_ID}, got {LARGEST_ID + 1}"
        with pytest.raises(ValueError, match=message):
            engine.call(load, str(good), LARGEST_ID + 1)
        with pytest.raises(ValueError, match=message):
            engine.call(generate_with, ASKS[1:2], [str(good)], LARGEST_ID + 1)
        assert engine.call(load, str(good))
        (answers,) = engine.call(generate_with, ASKS[1:2], [str(good)])
        assert deviation(merged(tiny, good), ASKS[1], answers) <= TOLERANCE
