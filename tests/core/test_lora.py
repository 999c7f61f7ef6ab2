"""What a LoRA adapter must be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hrm_text import lora
from hrm_text.config import read_config
from tests.adapters import make_adapter
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
        ({"r": None}, "r: must be an integer from 1 on, got None"),
        ({"r": 0}, "r: must be an integer from 1 on, got 0"),
        ({"r": True}, "r: must be an integer from 1 on, got True"),
        ({"rank_pattern": {"q_proj": "9"}}, r"rank_pattern\['q_proj'\]: must be an integer from 1 on, got '9'"),
        ({"rank_pattern": [9]}, r"rank_pattern: must be an object, got \[9\]"),
        ({"lora_alpha": None}, "lora_alpha: must be a number, got None"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\['q_proj'\]: must be a number, got 'x'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes the base model"),
    ],
)
def test_a_config_that_means_more_than_a_and_b_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.checked_rank(CONFIG | config, limit=8)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_a_field_that_is_missing_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: must be .*, got None"):
        lora.checked_rank({name: value for name, value in CONFIG.items() if name != field}, limit=8)


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
        lora.check_tensor(name, size, CONFIG, SHAPE)


@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_a_folder_is_checked_without_its_numbers(reference: Any, tmp_path: Path, file: str) -> None:
    folder = make_adapter(tmp_path / "adapter", reference, rank=8)
    path = folder / "adapter_model.safetensors"
    if file == "bin":
        torch.save(load_file(path), folder / "adapter_model.bin")
        path.unlink()
    lora.check_adapter(folder, SHAPE, 8)
    with pytest.raises(ValueError, match="rank is 8; the limit is 4"):
        lora.check_adapter(folder, SHAPE, 4)


def test_half_of_a_pair_is_refused(reference: Any, tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "adapter", reference, rank=8) / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"{BLOCK}.mlp.down_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"down_proj.lora_A.weight' comes without .*lora_B"):
        lora.check_adapter(path.parent, SHAPE, 8)


@pytest.mark.parametrize("missing", ["", "adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_named(reference: Any, tmp_path: Path, missing: str) -> None:
    folder = make_adapter(tmp_path / "adapter", reference, rank=8)
    if missing:
        (folder / missing).unlink()
    with pytest.raises(ValueError, match=r"no adapter can be read in .*/(adapter|nowhere)'"):
        lora.check_adapter(folder if missing else tmp_path / "nowhere", SHAPE, 8)
