"""LoRA adapters as PEFT saves them for transformers' HrmTextForCausalLM, and the oracle's model with one merged.

Both engines' tests use these, so that the same folder is served by both.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hrm_text.oracle import load_reference

TARGETS = {
    "self_attn": ("gate_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
ALPHA = 16


def make_adapter(folder: Path, reference: Any, rank: int = 8, seed: int = 1, only: str = "", **config: Any) -> Path:
    """A random adapter over every projection of both stacks, different in each.

    Args:
        folder: where it is saved.
        reference: the oracle's model.
        rank: of every projection that `rank_pattern` does not name by its last part.
        seed: of its numbers.
        only: a part of the names of the projections it is for; the rest are left out.
        config: further fields of its PEFT config.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in reference.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf in TARGETS.get(parent.rpartition(".")[2], ()) and only in name:
            out_features, in_features = module.weight.shape
            r = config.get("rank_pattern", {}).get(leaf, rank)
            key = f"base_model.model.{name}"
            for factor, shape in (("A", (r, in_features)), ("B", (out_features, r))):
                # Numbers that an engine in bf16 has too.
                tensors[f"{key}.lora_{factor}.weight"] = rounded(0.1 * torch.randn(shape, generator=generator))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": sorted({leaf for leaves in TARGETS.values() for leaf in leaves}),
        "bias": "none",
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


def scaled_adapter(folder: Path, reference: Any) -> Path:
    """A smaller adapter, for the H stack only, with every way PEFT has of scaling."""
    patterns = {"rank_pattern": {"k_proj": 6, "o_proj": 2}, "alpha_pattern": {"q_proj": 5, "up_proj": 7}}
    return make_adapter(folder, reference, rank=4, seed=2, only="H_module", use_rslora=True, **patterns)


@torch.no_grad()
def merged(tiny: str, adapter: Path) -> Any:
    """The oracle's model with the adapter folded into its weights."""
    model = load_reference(tiny)
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = config.get("alpha_pattern", {}).get(name.rpartition(".")[2], config["lora_alpha"])
        rank = len(tensors[key])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        model.get_submodule(name).weight += scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return model
