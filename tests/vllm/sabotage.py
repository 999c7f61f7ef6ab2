"""Negative controls: each undoes one thing that exactness rests on, in the engine's process."""


def span_keys_off() -> None:
    """Prefix-cache keys by raw tokens, as vLLM has them."""
    from vllm.v1.core import kv_cache_utils

    kv_cache_utils.generate_block_hash_extra_keys = kv_cache_utils.generate_block_hash_extra_keys.__wrapped__


def non_causal_everywhere() -> None:
    """causal=False for every multi-token piece, as the in-tree model has it."""
    from hrm_text.spans import Piece
    from hrm_vllm import attention

    def pieces(spans: object, start: int, end: int) -> list[Piece]:
        return [Piece(start, end, True)]

    # A row without spans is left alone otherwise.
    attention.pieces = pieces
    attention.split_rows.__globals__["pieces"] = pieces


def causal_everywhere() -> None:
    """Spans ignored by attention: an ordinary causal LM."""
    from hrm_vllm import attention

    attention.split_rows.__globals__["pieces"] = lambda spans, start, end: []


def chunks_unaligned() -> None:
    """Prefill chunks end wherever the budget ends."""
    from hrm_vllm import scheduler

    scheduler.chunk_end = lambda spans, start, end: end


def one_step_for_all() -> None:
    """A compiled stack writes to the KV slots of the step that it was compiled at, whichever runs it."""
    import contextlib

    from hrm_vllm.model import stacks

    stacks._slots_of = lambda stack, first, step: contextlib.nullcontext()  # type: ignore[assignment,return-value]
