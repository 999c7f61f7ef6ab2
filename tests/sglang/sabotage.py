"""Negative controls: each undoes one thing that exactness rests on, in every process of the engine.

SGLang starts its own processes, so the act is named in the environment, and `apply` is a plugin of its own:
`stubs/` holds the metadata of a distribution with that entry point.
"""

import os

VARIABLE = "HRM_TEXT_SABOTAGE"


def apply() -> None:
    """Do what the environment names, if anything."""
    act = os.environ.get(VARIABLE)
    if act:
        globals()[act]()


def span_keys_off() -> None:
    """Radix-cache keys by raw tokens, as SGLang has them."""
    from hrm_sglang import prefix_cache

    prefix_cache.keys_of = lambda req, token_ids: prefix_cache.array("q", token_ids)


def causal_everywhere() -> None:
    """Spans ignored by attention: an ordinary causal LM."""
    from hrm_sglang import attention

    attention.pieces = lambda spans, start, end: [attention.Piece(start, end, False)]


def non_causal_everywhere() -> None:
    """Every prefill piece bidirectional, as the in-tree model has it."""
    from hrm_sglang import attention

    attention.pieces = lambda spans, start, end: [attention.Piece(start, end, True)]


def chunks_unaligned() -> None:
    """Prefill chunks end wherever the budget ends."""
    from hrm_sglang import scheduler

    scheduler.chunk_end = lambda spans, start, end: end


def lora_numbers_shared() -> None:
    """Layer n of L and of H both number n for LoRA, as SGLang reads their names."""
    from sglang.srt.layers.utils import get_layer_id

    from hrm_sglang import lora

    lora.number_of = get_layer_id
