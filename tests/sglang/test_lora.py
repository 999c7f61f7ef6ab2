"""What an adapter must be, and its form in SGLang's stacked projections, without an engine."""

from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from hrm_sglang import lora
from hrm_text.config import read_config
from tests.conftest import TINY

SHAPE = read_config(TINY)
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
BLOCK = "base_model.model.model.H_module.layers.1"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: must be 'LORA', got 'IA3'"),
        ({"r": 16}, "r: the adapter's rank is 16; the limit is 8, from --max-lora-rank"),
        ({"rank_pattern": {"q_proj": 9}}, "r: the adapter's rank is 9; the limit is 8"),
        ({"bias": "all"}, "bias: must be 'none', got 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: is not supported for HRM-Text, got \['lm_head'\]"),
        ({"lora_bias": True}, "lora_bias: is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes the base model"),
    ],
)
def test_a_config_that_means_more_than_a_and_b_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.checked_rank(CONFIG | config, limit=8)


def test_the_rank_is_the_largest() -> None:
    assert lora.checked_rank(CONFIG, limit=None) == 8
    assert lora.checked_rank(CONFIG | {"rank_pattern": {"q_proj": 4, "k_proj": 12}}, limit=None) == 12


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("base_model.model.lm_head.lora_A.weight", (8, 64), "nothing for the embedding or the LM head"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (8, 256), "nothing for the embedding"),
        (f"{BLOCK}.self_attn.q_proj.lora_magnitude_vector", (64,), "is not supported"),
        (f"{BLOCK}.self_attn.up_proj.lora_A.weight", (8, 64), "is not supported"),
        (f"{BLOCK}.mlp.gate_up_proj.lora_A.weight", (8, 64), "is not supported"),
        ("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight", (8, 64), "is not supported"),
        (
            "base_model.model.model.L_module.layers.2.mlp.up_proj.lora_A.weight",
            (8, 64),
            "layer 2 is out of range; a stack has 2",
        ),
        (f"{BLOCK}.mlp.up_proj.lora_B.weight", (64, 8), r"has shape \(64, 8\); .* rank 8 need \(96, 8\)"),
        (f"{BLOCK}.mlp.down_proj.lora_A.weight", (8, 64), r"need \(8, 96\)"),
    ],
)
def test_a_tensor_without_a_place_is_refused(name: str, size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.check_tensor(name, torch.zeros(size), CONFIG, SHAPE)


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
