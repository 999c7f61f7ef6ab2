"""The form of an adapter in SGLang's stacked projections, without an engine."""

import pytest
import torch

pytest.importorskip("sglang")

from hrm_sglang import lora

CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
BLOCK = "base_model.model.model.H_module.layers.1"


def test_no_two_layers_share_a_number() -> None:
    names = [f"model.{stack}_module.layers.{n}.self_attn.o_proj" for stack in "LH" for n in range(16)]
    assert sorted(lora.number_of(name) or 0 for name in names) == list(range(32))
    assert lora.number_of("model.layers.3.self_attn.o_proj") is None
    assert lora.number_of("model.embed_tokens") is None


def test_a_layer_stacks_as_the_projection_does() -> None:
    """The fused projection of the stacked parts is what the parts give one by one, scaling included."""
    config = CONFIG | {"use_rslora": True, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"H_module.*k_proj": 5}}
    weights = {}
    for part, rank in (("gate_proj", 8), ("k_proj", 3)):
        weights[f"{BLOCK}.self_attn.{part}.lora_A.weight"] = torch.randn(rank, 64)
        weights[f"{BLOCK}.self_attn.{part}.lora_B.weight"] = torch.randn(64, rank)
    scaling = 16 / 8
    fused = lora.stacked(weights, config, 8, scaling)
    a, b = (fused[f"{BLOCK}.self_attn.gqkv_proj.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((32, 64), (256, 8))
    for index, (part, alpha, rank) in enumerate([("gate_proj", 16, 8), ("q_proj", 0, 8), ("k_proj", 5, 3)]):
        found = scaling * b[64 * index : 64 * (index + 1)] @ a[8 * index : 8 * (index + 1)]
        pair = [weights.get(f"{BLOCK}.self_attn.{part}.lora_{side}.weight") for side in "AB"]
        expected = torch.zeros(64, 64) if pair[0] is None else alpha / rank**0.5 * pair[1] @ pair[0]
        torch.testing.assert_close(found, expected)


def test_half_of_a_pair_is_refused() -> None:
    name = f"{BLOCK}.mlp.down_proj.lora_A.weight"
    with pytest.raises(ValueError, match=r"comes without .*lora_B"):
        lora.stacked({name: torch.zeros(8, 96)}, CONFIG, 8, 2.0)


def test_the_stand_ins_of_lora_engines_leave_the_oracle_alone() -> None:
    """Loading plugins in the test's process must not change torch under the oracle."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    assert not any(hasattr(getattr(torch, name), "__wrapped__") for name in ("tensor", "zeros", "empty", "arange"))
