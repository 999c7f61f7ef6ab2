"""The reference: transformers' eager HRM-Text in float32, with an explicit 4-D mask built from spans.

Every token that an engine emits or scores is compared with this.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hrm_text.spans import Spans


def load_reference(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """`transformers.HrmTextForCausalLM` with eager attention, in evaluation mode."""
    from transformers import HrmTextForCausalLM

    model = HrmTextForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model.to(device).eval()


def span_mask(spans: Spans, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The mask as bool (length, length): entry (i, j) says whether token i attends to token j."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    for start, end in spans:
        mask[start : min(end, length), start : min(end, length)] = True
    return mask


@torch.inference_mode()
def reference_logprobs(model: Any, ids: Sequence[int], spans: Spans) -> torch.Tensor:
    """Log-probs of the next token after every position.

    Args:
        model: from `load_reference`.
        ids: prompt ids followed by generated or scored ids.
        spans: of the prompt; what lies behind them is causal.

    Returns:
        float32 (len(ids), vocab): row i is the distribution of token i + 1.
    """
    device = model.device
    allowed = span_mask(spans, len(ids), device)
    bias = torch.zeros(allowed.shape, dtype=model.dtype, device=device)
    bias.masked_fill_(~allowed, torch.finfo(model.dtype).min)
    logits = model(
        input_ids=torch.tensor([list(ids)], device=device),
        attention_mask=bias[None, None],
        use_cache=False,
    ).logits[0]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def token_logprobs(model: Any, ids: Sequence[int], spans: Spans) -> torch.Tensor:
    """Log-prob of each token given those before it: float32 (len(ids) - 1,), entry i for ids[i + 1]."""
    rows = reference_logprobs(model, ids, spans)[:-1]
    return rows.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0]
