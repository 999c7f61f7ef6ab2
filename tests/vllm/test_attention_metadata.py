"""Split batches, over a plain torch kernel that reads the metadata as the real kernels document it.

The GPU suite runs the kernels themselves; here the splitting of both kinds of backend is compared with
the mask's definition for any batch: spans, context from the cache, decodes, padding rows.
"""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils

from hrm_text.spans import Spans, attention_allowed
from hrm_vllm import flash_attention
from hrm_vllm.attention import dynamic_causal_builder, split_rows, step_spans
from hrm_vllm.flash_attention import flash_builder, flash_impl
from tests.vllm.mixes import spans_for

BLOCK, HEADS, DIM = 4, 2, 8


class Kernel:
    """Paged attention by definition: a sequence's queries are its last tokens; `causal` is one flag or one each.

    A schedule that was made for another call would be followed all the same, so it is compared.
    """

    vllm_flash_attn_version = 3
    scale = 1.0

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, *_: Any
    ) -> Any:
        if metadata.scheduler_metadata is not None:
            expected = {
                "aot_schedule": True,
                "batch_size": len(metadata.seq_lens),
                "cu_query_lens": metadata.query_start_loc.tolist(),
                "max_query_len": metadata.max_query_len,
                "seqlens": metadata.seq_lens.tolist(),
                "max_seq_len": metadata.max_seq_len,
                "causal": metadata.causal,
                "max_num_splits": metadata.max_num_splits,
            }
            assert metadata.scheduler_metadata == expected
        for row in range(len(metadata.seq_lens)):
            first, last = int(metadata.query_start_loc[row]), int(metadata.query_start_loc[row + 1])
            length = int(metadata.seq_lens[row])
            if first == last:
                continue
            slots = metadata.block_table[row][: math.ceil(length / BLOCK)]
            keys, values = (kv_cache[i][slots].reshape(-1, HEADS, DIM)[:length] for i in (0, 1))
            scores = torch.einsum("qhd,khd->hqk", query[first:last], keys)
            causal = metadata.causal if isinstance(metadata.causal, bool) else bool(metadata.causal[row])
            if causal:
                positions = torch.arange(length - (last - first), length)
                scores.masked_fill_(torch.arange(length)[None, :] > positions[:, None], -torch.inf)
            output[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return output


def unpaged_kernel(**call: Any) -> None:
    """`flash_attn_varlen_func` without pages: every sequence sees its own keys, all of them."""
    assert not call["causal"] and call["cu_seqlens_k"].tolist() == call["cu_seqlens_q"].tolist()
    starts = call["cu_seqlens_q"].tolist()
    assert max(b - a for a, b in pairwise(starts)) == call["max_seqlen_q"] == call["max_seqlen_k"]
    for first, last in pairwise(starts):
        scores = torch.einsum("qhd,khd->hqk", call["q"][first:last], call["k"][first:last]) * call["softmax_scale"]
        call["out"][first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), call["v"][first:last])


class Builder:
    aot_schedule = True
    kv_cache_dtype = torch.bfloat16

    def _get_scheduler_metadata(self, **made_for: Any) -> dict[str, Any]:
        return {key: value.tolist() if torch.is_tensor(value) else value for key, value in made_for.items()}

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.ALWAYS

    def build_for_cudagraph_capture(self, common: CommonAttentionMetadata) -> Any:
        return self.build(0, common)

    def build(self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        fields = (
            "query_start_loc",
            "seq_lens",
            "block_table_tensor",
            "causal",
            "max_query_len",
            "max_seq_len",
            "num_actual_tokens",
        )
        metadata = SimpleNamespace(**{field: getattr(common, field) for field in fields}, max_num_splits=32)
        metadata.scheduler_metadata = None
        metadata.block_table = metadata.block_table_tensor
        return metadata


BACKENDS = {
    "one flag a call": (flash_builder(Builder), flash_impl(Kernel)),
    "a flag a sequence": (dynamic_causal_builder(Builder), Kernel),
}


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, int, Spans]:
    """(context, query tokens, spans) of a row whose step ends at no span's inside."""
    length = draw(st.integers(1, 24))
    flat = draw(spans_for(length, 12))
    spans = tuple(zip(flat[::2], flat[1::2], strict=True))
    ends = [e for e in range(1, length + 1) if not any(s < e < t for s, t in spans)]
    end = draw(st.sampled_from(ends))
    return draw(st.integers(0, end - 1)), end, tuple(s for s in spans if s[1] - s[0] > 1)


def batch_of(drawn: list[tuple[int, int, Spans]], padding: int) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    lengths = [end - context for context, end, _ in drawn] + [0] * padding
    query_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    seq_lens = torch.tensor([end for _, end, _ in drawn] + [0] * padding, dtype=torch.int32)
    blocks = math.ceil(24 / BLOCK)
    table = torch.randperm(blocks * len(seq_lens)).reshape(len(seq_lens), blocks).to(torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=torch.from_numpy(query_start),
        query_start_loc_cpu=torch.from_numpy(query_start),
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        num_reqs=len(seq_lens),
        num_actual_tokens=int(query_start[-1]),
        max_query_len=max(lengths),
        max_seq_len=24,
        block_table_tensor=table,
        slot_mapping=torch.zeros(1),
    )
    return common, torch.randn(2, blocks * len(seq_lens), BLOCK, HEADS, DIM)


def expected_output(drawn: list[tuple[int, int, Spans]], common: Any, cache: torch.Tensor, query: torch.Tensor) -> Any:
    output = torch.zeros_like(query)
    for row, (context, end, spans) in enumerate(drawn):
        first = int(common.query_start_loc[row])
        keys, values = (cache[i][common.block_table_tensor[row]].reshape(-1, HEADS, DIM)[:end] for i in (0, 1))
        allowed = torch.tensor([[attention_allowed(spans, i, j) for j in range(end)] for i in range(context, end)])
        scores = torch.einsum("qhd,khd->hqk", query[first : first + end - context], keys)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        output[first : first + end - context] = torch.einsum("hqk,khd->qhd", weights, values)
    return output


def step_kv(drawn: list[tuple[int, int, Spans]], common: Any, cache: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values of the step's own tokens, as the cache has them."""
    pages = [cache[:, common.block_table_tensor[row]].flatten(1, 2) for row in range(len(drawn))]
    own = [each[:, context:end] for each, (context, end, _) in zip(pages, drawn, strict=True)]
    return list(torch.cat(own, 1))


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("min_unpaged", [1, 12, 2048])
@settings(max_examples=100, deadline=None)
@given(drawn=st.lists(rows(), min_size=1, max_size=5), padding=st.integers(0, 2), seed=st.integers(0, 99))
def test_any_batch_equals_the_mask(
    kind: str, min_unpaged: int, drawn: list[tuple[int, int, Spans]], padding: int, seed: int
) -> None:
    torch.manual_seed(seed)
    builder, kernel = (cls() for cls in BACKENDS[kind])
    common, cache = batch_of(drawn, padding)
    query = torch.randn(common.num_actual_tokens, HEADS, DIM)
    key, value = step_kv(drawn, common, cache)
    output = torch.full_like(query, torch.nan)
    with (
        mock.patch.object(flash_attention, "MIN_UNPAGED_TOKENS", min_unpaged),
        mock.patch.object(fa_utils, "flash_attn_varlen_func", unpaged_kernel, create=True),
    ):
        metadata = builder.build(0, common, row_spans=[spans for *_, spans in drawn])
        kernel.forward(None, query, key, value, cache, metadata, output)
    torch.testing.assert_close(output, expected_output(drawn, common, cache, query))


def test_which_prompts_read_their_own_keys() -> None:
    """Those that are all there, alone or in a step of enough of them; never beside a quantised cache."""
    whole, decode, cached = (0, 3000, ((0, 3000),)), (9, 10, ((0, 5),)), (4, 40, ((4, 40),))

    def calls(drawn: list[tuple[int, int, Spans]], unpaged: bool = True) -> list[tuple[list[bool], str]]:
        starts = np.concatenate([[0], np.cumsum([end - context for context, end, _ in drawn])])
        batch = split_rows([spans for *_, spans in drawn], starts, np.array([end for _, end, _ in drawn]))
        assert batch is not None
        kinds = flash_attention.kinds_of_calls(batch, unpaged)
        return [(keep.tolist(), "causal" if causal else "own" if own else "pages") for keep, causal, own in kinds]

    small = (0, 8, ((0, 8),))
    assert calls([small]) == [([True], "own")]
    assert calls([small], unpaged=False) == [([True], "pages")]
    assert calls([decode, small, cached]) == [([True, True, True], "pages")]
    assert calls([decode, whole]) == [([False, True], "own"), ([True, False], "pages")]
    assert calls([whole, cached, whole]) == [([True, True, True], "own"), ([False, True, False], "pages")]
    scored = (0, 3004, ((0, 3000),))
    assert calls([scored, scored]) == [([True] * 4, "own"), ([False, True, False, True], "causal")]
    asked = (4, 64, ((4, 8),))
    assert calls([asked, asked]) == [([True] * 4, "causal"), ([True, False, True, False], "pages")]


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("spans", [(), ((0, 6),)])
def test_the_rows_that_will_be_read_go_with_the_metadata(kind: str, spans: Spans) -> None:
    common, _ = batch_of([(0, 8, spans), (5, 6, ())], 0)
    read = torch.tensor([7, 8])
    build = partial(BACKENDS[kind][0]().build, 0, common, row_spans=[spans, ()])
    assert build(read=read).prefix_lm_read is read and build().prefix_lm_read is None


@pytest.mark.parametrize("kind", BACKENDS)
def test_decodes_are_left_to_the_stock_builder(kind: str) -> None:
    builder = BACKENDS[kind][0]()
    common, _ = batch_of([(9, 10, ((0, 10),)), (5, 6, ())], 0)
    metadata = builder.build(0, common, row_spans=[((0, 10),), ()])
    assert metadata.block_table is common.block_table_tensor and metadata.seq_lens is common.seq_lens
    assert not hasattr(metadata, "prefix_lm_calls")
    captured = builder.build_for_cudagraph_capture(common)
    assert captured.seq_lens is common.seq_lens and captured.causal == metadata.causal
    assert builder.get_cudagraph_support(None, None) == AttentionCGSupport.UNIFORM_BATCH


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_batch_without_spans_handed_over_is_an_error(kind: str) -> None:
    common, _ = batch_of([(0, 4, ())], 0)
    with pytest.raises(RuntimeError, match="did not take hold"):
        BACKENDS[kind][0]().build(0, common)
    with step_spans([()]):
        BACKENDS[kind][0]().build(0, common)
