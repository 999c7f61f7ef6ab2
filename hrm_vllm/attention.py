"""PrefixLM attention metadata for vLLM's paged backends.

A batch row whose query tokens touch a span is split at span bounds into *virtual sequences*: slices of
the query with the same block-table row, each ending where its piece ends. The step's keys and values
are written before attention runs, so a non-causal virtual sequence sees exactly its span and what
lies before it. Rows without spans, decode and verification included, are left to the stock builder.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)

from hrm_text.spans import Piece, Spans, pieces

SUPPORTED_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")

# Spans of the rows of the step being prepared, where a runner cannot hand them to `build` (V1).
_step_spans: Sequence[Spans] | None = None


@contextmanager
def step_spans(rows: Sequence[Spans]) -> Iterator[None]:
    """Make `rows` the spans of the batch whose metadata is built inside."""
    global _step_spans
    _step_spans = rows
    try:
        yield
    finally:
        _step_spans = None


@dataclass(frozen=True)
class VirtualBatch:
    """A batch cut at span bounds; row r of the batch became the entries with `rows == r`.

    Attributes:
        rows: int64 (n,), batch row of each virtual sequence.
        starts, ends: int32 (n,), its query tokens [start, end) in the flattened batch.
        seq_ends: int32 (n,), KV length it sees; -1 where the row is whole and its own length holds.
        bidirectional: bool (n,).
    """

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    seq_ends: np.ndarray
    bidirectional: np.ndarray


def split_rows(rows: Sequence[Spans], query_start: np.ndarray, seq_lens: np.ndarray) -> VirtualBatch | None:
    """Cut a batch into virtual sequences; None when every row is causal.

    Args:
        rows: spans of each row.
        query_start: (rows + 1,), offsets of the rows' query tokens.
        seq_lens: (rows,), tokens of each row with this step's; exact where the row is prefilling.
    """
    cut: dict[int, list[Piece]] = {}
    for row, spans in enumerate(rows):
        if not spans:
            continue
        context = int(seq_lens[row]) - int(query_start[row + 1] - query_start[row])
        if context >= spans[-1][1]:
            continue
        row_pieces = pieces(spans, context, int(seq_lens[row]))
        if any(piece.bidirectional for piece in row_pieces):
            cut[row] = row_pieces
    if not cut:
        return None
    entries: list[tuple[int, int, int, int, bool]] = []
    for row in range(len(query_start) - 1):
        first, last = int(query_start[row]), int(query_start[row + 1])
        offset = first - cut[row][0].start if row in cut else 0
        if row not in cut:
            entries.append((row, first, last, -1, False))
            continue
        entries += [(row, p.start + offset, p.end + offset, p.end, p.bidirectional) for p in cut[row]]
    columns = list(zip(*entries, strict=True))
    return VirtualBatch(
        rows=np.array(columns[0], dtype=np.int64),
        starts=np.array(columns[1], dtype=np.int32),
        ends=np.array(columns[2], dtype=np.int32),
        seq_ends=np.array(columns[3], dtype=np.int32),
        bidirectional=np.array(columns[4], dtype=bool),
    )


def virtual_metadata(
    common: CommonAttentionMetadata, batch: VirtualBatch, causal: bool | torch.Tensor
) -> CommonAttentionMetadata:
    """`common` with `batch`'s virtual sequences as its rows."""
    device = common.seq_lens.device

    def to_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    lengths = batch.ends - batch.starts
    query_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = to_device(batch.rows)
    seq_ends = to_device(batch.seq_ends)
    seq_lens = torch.where(seq_ends >= 0, seq_ends, common.seq_lens[rows])
    upper = common.seq_lens_cpu_upper_bound
    return common.replace(
        query_start_loc=to_device(query_start),
        query_start_loc_cpu=torch.from_numpy(query_start),
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=None if upper is None else upper[torch.from_numpy(batch.rows)],
        num_reqs=len(batch.rows),
        num_actual_tokens=int(query_start[-1]),
        max_query_len=int(lengths.max()),
        block_table_tensor=common.block_table_tensor[rows],
        causal=causal,
        is_prefilling=None,
        req_idx=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def split_step(rows: Sequence[Spans] | None, common: CommonAttentionMetadata) -> VirtualBatch | None:
    """Cut the step's batch at span bounds; None when no row of it needs that.

    Raises:
        RuntimeError: no runner said what the rows' spans are.
    """
    if rows is None:
        raise RuntimeError(
            "hrm_vllm: attention metadata is being built without the batch's spans; "
            "the model-runner hook did not take hold, so prompts would be masked wrongly"
        )
    if common.max_query_len <= 1 or not any(rows):
        return None
    assert common.seq_lens_cpu_upper_bound is not None
    count = common.num_reqs
    padded = [*rows[:count], *[()] * (count - len(rows))]
    return split_rows(
        padded, common.query_start_loc_cpu[: count + 1].numpy(), common.seq_lens_cpu_upper_bound[:count].numpy()
    )


@functools.cache
def prefix_lm_backend(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """`base` with a metadata builder that splits rows at span bounds.

    Raises:
        ValueError: a backend whose kernels cannot mix causal and bidirectional sequences exactly.
    """
    name = base.get_name()
    if name not in SUPPORTED_BACKENDS:
        raise ValueError(
            f"attention backend {name} is not supported for HRM-Text: its causal flag is per batch, or it was "
            f"not verified; use one of {', '.join(SUPPORTED_BACKENDS)} (--attention-backend)"
        )
    if name == "FLASH_ATTN":
        from hrm_vllm.flash_attention import flash_overrides

        return subclass_attention_backend_with_overrides("PrefixLM", base, flash_overrides(base))
    builder = dynamic_causal_builder(base.get_builder_cls())
    return subclass_attention_backend_with_overrides("PrefixLM", base, {"get_builder_cls": lambda: builder})


class SpanSplitting:
    """Mixin of a metadata builder: rows that touch a span are split, any other batch is the stock builder's."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """FULL CUDA graphs for uniform batches only: a split batch has another shape each time."""
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda s: s.value)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        with step_spans([()] * common_attn_metadata.num_reqs):
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        row_spans: Sequence[Spans] | None = None,
        read: torch.Tensor | None = None,
    ) -> Any:
        rows = _step_spans if row_spans is None else row_spans
        batch = split_step(rows, common_attn_metadata)
        if batch is not None:
            metadata = self._build_split(common_attn_metadata, batch, fast_build)
        else:
            common_attn_metadata = self._unsplit(common_attn_metadata)
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
            # Read by hrm_vllm.decode. A batch of no request's rows is a dry run, which warms up vLLM's own layers.
            metadata.prefix_lm_decode = bool(rows) and common_attn_metadata.max_query_len <= 1
        metadata.prefix_lm_read = read  # by hrm_vllm.prefill, which passes it on
        return metadata

    def _build_split(self, common: CommonAttentionMetadata, batch: VirtualBatch, fast_build: bool) -> Any:
        raise NotImplementedError

    def _unsplit(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        return common


def dynamic_causal_builder(base: Any) -> Any:
    """For kernels that read a per-sequence int32 `causal` tensor (CPU_ATTN, TRITON_ATTN): one call."""

    class PrefixLMBuilder(SpanSplitting, base):
        def _build_split(self, common: CommonAttentionMetadata, batch: VirtualBatch, fast_build: bool) -> Any:
            causal = torch.from_numpy((~batch.bidirectional).astype(np.int32))
            causal = causal.to(common.seq_lens.device, non_blocking=True)
            return base.build(self, 0, virtual_metadata(common, batch, causal), fast_build)

    return PrefixLMBuilder
