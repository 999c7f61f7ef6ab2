"""Differences between the supported SGLang versions, one function each.

The adapter is written for 0.5.23. Each function names the version from which on its first branch holds, and can
go when the older ones are given up.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SUPPORTED = ((0, 5, 20), (0, 5, 21), (0, 5, 22), (0, 5, 23))
SUPPORTED_TEXT = "SGLang 0.5.20 to 0.5.23"


def check_version() -> None:
    """Refuse an SGLang that the hooks were not written for.

    Raises:
        hrm_sglang.hooks.HookError: any release but those in `SUPPORTED`.
    """
    from packaging.version import Version
    from sglang.version import __version__

    from hrm_sglang.hooks import HookError

    if Version(__version__).release[:3] not in SUPPORTED:
        raise HookError("version", f"this plugin was written for {SUPPORTED_TEXT}")


@functools.cache
def _from(*release: int) -> bool:
    """Whether this SGLang is `release` or later."""
    from packaging.version import Version
    from sglang.version import __version__

    return Version(__version__).release >= release


def prefix_len(req: Any) -> int:
    """Tokens of a `Req` that are in the KV pool; counted from 0.5.22 on, before that known by their slots."""
    return req.prefix_len if _from(0, 5, 22) else len(req.prefix_indices)


def extend_end(req: Any) -> int:
    """Where this step's chunk of a `Req` ends; the start went to another field in 0.5.22."""
    return req.extend_end if _from(0, 5, 22) else req.extend_range.end


def hit_len(result: Any) -> int:
    """Length of a radix cache's `MatchResult`; counted from 0.5.22 on, before that known by its slots."""
    return result.device_prefix_len if _from(0, 5, 22) else len(result.device_indices)


def searching_method() -> str:
    """Method of `UnifiedRadixCache` that walks the tree for a key.

    From 0.5.22 on it stands behind `match_prefix`, and 0.5.22 itself calls it to find what was just inserted.
    """
    return "_match_tree" if _from(0, 5, 22) else "match_prefix"


def inserting_methods() -> tuple[str, ...]:
    """Methods of `UnifiedRadixCache` that take a request and insert its keys.

    0.5.22 made them one; 0.5.21 had parted freeing a finished request's slots from inserting its keys.
    """
    if _from(0, 5, 22):
        return ("checkpoint_into_tree",)
    return ("cache_unfinished_req", "insert_req" if _from(0, 5, 21) else "cache_finished_req")


def keyed_methods() -> tuple[str, ...]:
    """Methods of `UnifiedRadixCache` that read or write keys; `touch_prefix` came with 0.5.22."""
    return (searching_method(), "insert", *inserting_methods(), *(["touch_prefix"] if _from(0, 5, 22) else []))


def make_radix_cache(context: Any, cache_class: type) -> Any:
    """A unified radix cache of our class; its factory takes a class from 0.5.21 on.

    What the factory does beside that in 0.5.20 is for hybrid models, HiCache and external caches; none is served.
    """
    if _from(0, 5, 21):
        from sglang.srt.mem_cache.registry import create_unified_radix_cache

        return create_unified_radix_cache(context, cache_class=cache_class)
    from sglang.srt.mem_cache.unified_cache.components import ComponentType

    context.params.tree_components = (ComponentType.FULL,)
    return cache_class(context.params)


def clipping_passage() -> str:
    """Where `PrefillAdder` clips a continuing chunk to free memory, which has an object of its own from 0.5.21 on."""
    if _from(0, 5, 21):
        return "self.memory_budget.available_chunk_tokens("
    return "_rem_tokens = min(self.rem_chunk_tokens, int(self.rem_total_tokens))"


def clipped_chunk(adder: Any) -> int:
    """What budget and free memory leave for a continuing chunk; see `clipping_passage`."""
    if _from(0, 5, 21):
        left: int = adder.memory_budget.available_chunk_tokens(adder.rem_chunk_tokens)
        return left if adder.chunked_req_limit is None else min(left, adder.chunked_req_limit)
    left = min(adder.rem_chunk_tokens, int(adder.rem_total_tokens))
    return left if left > 0 else adder.rem_chunk_tokens


@contextmanager
def unclipped(adder: Any) -> Iterator[None]:
    """Keeps what `clipped_chunk` heeds, except the budget, from clipping a chunk inside."""
    if _from(0, 5, 21):
        limit, adder.chunked_req_limit = adder.chunked_req_limit, None
        adder.memory_budget.available_chunk_tokens = lambda chunk_limit: chunk_limit
        try:
            yield
        finally:
            adder.chunked_req_limit = limit
            del adder.memory_budget.available_chunk_tokens
        return
    # As if this much more were free; a request's tokens are far fewer.
    more = 1 << 30
    adder.rem_total_token_offset -= more
    try:
        yield
    finally:
        adder.rem_total_token_offset += more


def fill_kv_slots(backend: Any, forward_batch: Any, rows: Any, lengths: Any, kv_indptr: Any, kv_indices: Any) -> None:
    """Fill in the offsets and KV slots of the first `lengths` tokens of `rows` for the Triton backend.

    0.5.22 plans them once a batch and takes our offsets; before it, the backend's own method writes to offsets
    that it shares with the stock launch.
    """
    if _from(0, 5, 22):
        plan = forward_batch.kv_loc_plan
        backend._fill_kv_indptr_and_indices(plan, len(rows), lengths, rows, kv_indices, kv_indptr)
        return
    kv_indptr[1:] = lengths.cumsum(0)
    backend.kv_index_translator.fill_packed_read_stream(
        req_pool_indices=rows,
        seq_lens=lengths,
        indptr=kv_indptr,
        total_tokens=kv_indices.numel(),
        out=kv_indices,
    )
