"""Pipeline and tensor parallelism and LoRA, against the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hrm_text.oracle import load_reference
from tests.vllm.engine import Answer, Ask, Engine
from tests.vllm.mixes import TOLERANCE, deviation
from tests.vllm.test_prefix_cache import prompt

pytestmark = pytest.mark.cpu

ASKS = [
    Ask(prompt(120), (0, 50, 60, 110), 8),
    Ask(prompt(60, seed=2), None, 8),
    Ask(prompt(90, seed=3), (), 8, score=True),
]
TARGETS = {
    "self_attn": ("gate_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
RANK, ALPHA = 8, 16


@pytest.mark.parametrize("stages", [2])
def test_pipeline_stages(tiny: str, reference: Any, stages: int) -> None:
    """Each stage holds the KV slots of its own steps only, so two stages hold twice the tokens."""
    with Engine(model=tiny, pipeline_parallel_size=stages, max_num_batched_tokens=96) as engine:
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


def pool_tokens(llm: Any) -> int:
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def _pool_of_one(tiny: str) -> int:
    with Engine(model=tiny, max_num_batched_tokens=96) as engine:
        return engine.call(pool_tokens)


def make_adapter(folder: Path, reference: Any) -> Path:
    """A random LoRA adapter in PEFT's format over every projection."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    modules = dict(reference.named_modules())
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in TARGETS.get(parent.rpartition(".")[2], ()):
            out_features, in_features = module.weight.shape
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(RANK, in_features, generator=generator)
            tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(out_features, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({leaf for leaves in TARGETS.values() for leaf in leaves}),
        "bias": "none",
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def merged(tiny: str, adapter: Path) -> Any:
    """The oracle's model with the adapter folded into its weights."""
    from safetensors.torch import load_file

    model = load_reference(tiny)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        module.weight += ALPHA / RANK * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return model


def generate_with(llm: Any, adapter: str, asks: list[Ask]) -> list[list[Answer]]:
    from vllm.lora.request import LoRARequest

    from tests.vllm.engine import generate

    return generate(llm, asks, LoRARequest("adapter", 1, adapter) if adapter else None)


def test_lora_equals_merged_weights(tiny: str, reference: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", reference)
    oracle = merged(tiny, adapter)
    with Engine(model=tiny, enable_lora=True, max_lora_rank=RANK, max_num_batched_tokens=160) as engine:
        for path, model in ((str(adapter), oracle), ("", reference), (str(adapter), oracle)):
            for ask, answers in zip(ASKS, engine.call(generate_with, path, ASKS), strict=True):
                assert deviation(model, ask, answers) <= TOLERANCE
                assert (deviation(reference, ask, answers) > 100 * TOLERANCE) == bool(path)
