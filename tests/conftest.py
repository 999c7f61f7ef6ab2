"""Fixtures shared by all tests."""

from pathlib import Path
from typing import Any

import pytest

TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "H_cycles": 2,
    "L_cycles": 3,
    "bos_token_id": 6,
    "eos_token_id": 11,
    "pad_token_id": 5,
    # Large enough for the attention pattern to show in the log-probs of an untrained model.
    "initializer_range": 0.1,
}

# Wide enough for every kernel of decode steps, as a GPU's tests want it.
WIDE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 6,
    "head_dim": 128,
    "initializer_range": 0.03,
}


def make_checkpoint(folder: Path, dtype: str = "float32", **overrides: Any) -> Path:
    """A random HRM-Text of a few thousand parameters, saved as transformers saves it."""
    import torch
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    model = HrmTextForCausalLM(HrmTextConfig(**(TINY | overrides)))
    model.model.z_L_init.data.normal_(0, 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a tiny random checkpoint."""
    return str(make_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def reference(tiny: str) -> Any:
    """The oracle's model for `tiny`."""
    from hrm_text.oracle import load_reference

    return load_reference(tiny)
