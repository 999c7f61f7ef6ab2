"""A radix cache keyed by span.

The KV of a token inside a span depends on the whole span, also on what lies behind the token. So inside a
span every token's key is 63 bits of a keyed hash of (the span's tokens, its start, its length, the token's
offset); outside, it is the token's id. Keys stay as many as the tokens, and page size is 1, so all of
SGLang's bookkeeping holds. A prompt whose spans differ leaves the shared path at the span's first token.

Width: the hash has a secret of the process, so no two spans can be prepared to collide, and a hit must
cover `MIN_SPAN_HIT` keys of the span it ends in, or it is floored to the span's start.
"""

import dataclasses
import functools
import hashlib
import secrets
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.mem_cache.registry import TreeCacheBuildContext
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from hrm_sglang.compat import hit_len, inserting_methods, make_radix_cache, searching_method
from hrm_sglang.spans import spans_of
from hrm_text.spans import Span, Spans, span_digest

NAME = "hrm_text"
MIN_SPAN_HIT = 4
_SECRET = secrets.token_bytes(32)
_ATTRIBUTE = "_hrm_text_span_keys"


def span_keys(ids: Sequence[int], span: Span) -> array:
    """Keys of one span's tokens: negative, so that none equals a token id."""
    length = span[1] - span[0]
    seed = span_digest(ids, span) + array("q", span).tobytes()
    stream = hashlib.shake_256(_SECRET + seed).digest(8 * length)
    keys = array("q")
    keys.frombytes(stream)
    return array("q", (key | -(1 << 63) for key in keys))


def keys_of(req: Any, token_ids: Sequence[int]) -> array:
    """Keys of the first tokens of a request, its generated ones included."""
    spans = spans_of(req)
    if not spans:
        return array("q", token_ids)
    cached: list[tuple[Span, array]] | None = getattr(req, _ATTRIBUTE, None)
    if cached is None:
        cached = [(span, span_keys(req.origin_input_ids, span)) for span in spans]
        setattr(req, _ATTRIBUTE, cached)
    keys = array("q", token_ids)
    for (start, end), hashed in cached:
        if start < len(keys):
            keys[start : min(end, len(keys))] = hashed[: len(keys) - start]
    return keys


def floor_hit(spans: Spans, hit: int) -> int:
    """`hit`, or the start of the span in which it ends after fewer than MIN_SPAN_HIT keys."""
    for start, end in spans:
        if start < hit < min(end, start + MIN_SPAN_HIT):
            return start
    return hit


class SpanRadixCache(UnifiedRadixCache):
    """SGLang 0.5.23's unified radix cache, with every key rewritten on its way in.

    Whatever it is asked without a request has keys of unknown spans, so it is refused or ignored.
    """

    _inserting: Any = None

    def _search(self, walk: Callable[..., Any], params: Any) -> Any:
        """Around the method that walks the tree for a key, whoever asks."""
        req = params.req
        if req is None:
            raise RuntimeError("hrm_sglang: the radix cache was searched without a request, so its spans are unknown")
        result = walk(self, self._rewritten(params, req, params.key.limit))
        floored = floor_hit(spans_of(req), hit_len(result))
        if floored < hit_len(result):
            result = walk(self, self._rewritten(params, req, floored))
        return result

    def _rewritten(self, params: Any, req: Any, limit: int | None) -> Any:
        return dataclasses.replace(params, key=_with_keys(params.key, req, limit))

    def touch_prefix(self, key: Any) -> None:
        """SGLang refreshes the age of waiting requests' prefixes by raw tokens, which are no keys here."""

    def _insert_request(self, method: Callable[..., None], req: Any, *args: Any, **kwargs: Any) -> None:
        """Around the methods that insert a request's keys, so that `insert` knows the request."""
        self._inserting = req
        try:
            method(self, req, *args, **kwargs)
        finally:
            self._inserting = None

    def insert(self, params: Any) -> Any:
        req = self._inserting
        if req is None:
            raise RuntimeError("hrm_sglang: the radix cache was filled without a request, so its spans are unknown")
        return super().insert(self._rewritten(params, req, params.key.limit))


def _put_around(name: str, ours: Callable[..., Any]) -> None:
    """Override the method `name`, which differs between versions, by `ours` with the stock method as its first."""
    setattr(SpanRadixCache, name, functools.partialmethod(ours, getattr(UnifiedRadixCache, name)))


_put_around(searching_method(), SpanRadixCache._search)
for _name in inserting_methods():
    _put_around(_name, SpanRadixCache._insert_request)


def _with_keys(key: Any, req: Any, limit: int | None) -> Any:
    from sglang.srt.mem_cache.radix_cache import RadixKey

    if key.is_bigram:
        raise RuntimeError("hrm_sglang: the radix cache was asked for bigram keys, which speculative decoding uses")
    return RadixKey(keys_of(req, key.token_ids), key.extra_key, limit=limit, cache_salt=key.cache_salt)


def make_cache(context: TreeCacheBuildContext) -> Any:
    """Factory for `register_radix_cache_backend`."""
    return make_radix_cache(context, SpanRadixCache)
