"""Tensor names, against a checkpoint as transformers saves it and the model as transformers runs it."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hrm_text.weights import GATE_UP_SHARDS, GQKV_SHARDS, PACKED_MODULES, target_of


@pytest.fixture(scope="module")
def on_disk(tiny: str) -> dict[str, torch.Tensor]:
    return load_file(Path(tiny, "model.safetensors"))


def test_every_tensor_on_disk_is_a_parameter_of_its_own(on_disk: dict[str, torch.Tensor]) -> None:
    blocks = [f"model.{stack}_module.layers.{layer}" for stack in "LH" for layer in range(2)]
    parameters = {"lm_head.weight", "model.embed_tokens.weight", "model.z_L_init"} | {
        f"{block}.{projection}.weight"
        for block in blocks
        for projection in ("self_attn.gqkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    targets = [target_of(name) for name in on_disk]

    assert all(target.shard is None for target in targets)
    assert sorted(target.parameter for target in targets) == sorted(parameters)


def test_fused_tensors_are_their_shards_in_order(on_disk: dict[str, torch.Tensor], reference: Any) -> None:
    shards: dict[str, dict[int | None, torch.Tensor]] = defaultdict(dict)
    for name, tensor in reference.state_dict().items():
        target = target_of(name)
        assert target.shard not in shards[target.parameter]
        shards[target.parameter][target.shard] = tensor

    assert shards.keys() == {target_of(name).parameter for name in on_disk}
    for name, fused in on_disk.items():
        parts = shards[target_of(name).parameter]
        if None in parts:
            assert list(parts) == [None]
            torch.testing.assert_close(parts[None], fused, rtol=0, atol=0)
        else:
            assert sorted(index for index in parts if index is not None) == list(range(len(parts)))
            torch.testing.assert_close(torch.cat([parts[i] for i in range(len(parts))]), fused, rtol=0, atol=0)


def test_fused_parameters_are_the_packed_modules(reference: Any) -> None:
    fused: dict[str, set[str]] = defaultdict(set)
    for name in reference.state_dict():
        target = target_of(name)
        if target.shard is not None:
            module = target.parameter.split(".")[-2]
            fused[module].add(name.split(".")[-2])
            assert PACKED_MODULES[module][target.shard] == name.split(".")[-2]

    assert fused == {"gqkv_proj": set(GQKV_SHARDS), "gate_up_proj": set(GATE_UP_SHARDS)}
    assert fused.keys() == PACKED_MODULES.keys()


def test_the_two_gates_are_told_apart() -> None:
    assert target_of("model.L_module.layers.1.self_attn.gate_proj.weight") == (
        "model.L_module.layers.1.self_attn.gqkv_proj.weight",
        0,
    )
    assert target_of("model.L_module.layers.1.mlp.gate_proj.weight") == (
        "model.L_module.layers.1.mlp.gate_up_proj.weight",
        0,
    )
