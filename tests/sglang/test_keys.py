"""The radix cache's keys, without an engine."""

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from hrm_sglang.prefix_cache import MIN_SPAN_HIT, floor_hit, keys_of, span_keys
from tests.sglang.engine import prompt

P = prompt(60)


def request(spans: list[int], ids: tuple[int, ...] = P) -> Any:
    """What the cache reads of a `Req`."""
    params = SimpleNamespace(custom_params={"prefix_lm_spans": spans})
    return SimpleNamespace(rid="x", origin_input_ids=array("q", ids), sampling_params=params)


def shared(left: Any, right: Any, ids: tuple[int, ...] = P) -> int:
    """Keys that two requests with the same tokens share."""
    pairs = zip(keys_of(left, array("q", ids)), keys_of(right, array("q", ids)), strict=True)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(ids))


def test_keys_are_as_many_as_the_tokens_and_raw_outside_spans() -> None:
    generated = array("q", [*P, 7, 8, 9])
    keys = keys_of(request([10, 30]), generated)
    assert len(keys) == len(generated)
    assert keys[:10] == generated[:10] and keys[30:] == generated[30:]
    assert all(key < 0 for key in keys[10:30]) and len(set(keys[10:30])) == 20


def test_a_cut_key_is_the_whole_one_cut() -> None:
    assert keys_of(request([10, 30]), array("q", P[:20])) == keys_of(request([10, 30]), array("q", P))[:20]


def test_requests_part_where_their_spans_do() -> None:
    assert shared(request([0, 40]), request([0, 40])) == 60
    assert shared(request([0, 40]), request([0, 41])) == 0
    assert shared(request([0, 20, 25, 40]), request([0, 20, 25, 41])) == 25
    assert shared(request([10, 40]), request([])) == 10
    other = request([0, 40], (*P[:39], 99, *P[40:]))
    assert shared(request([0, 40]), other) == 0


def test_every_key_of_a_span_changes_with_its_tokens_bounds_and_place() -> None:
    base = span_keys(P, (0, 20))
    for ids, span in ((P, (0, 21)), ((*P[:19], 99), (0, 20)), ((5, *P), (1, 21))):
        assert not set(base) & set(span_keys(ids, span))


def test_a_hit_covers_enough_of_the_span_it_ends_in() -> None:
    spans = ((10, 40), (40, 42))
    assert [floor_hit(spans, hit) for hit in (9, 10, 11, 13, 10 + MIN_SPAN_HIT, 39, 40, 41, 42, 43)] == [
        9, 10, 10, 10, 14, 39, 40, 40, 42, 43,
    ]  # fmt: skip
