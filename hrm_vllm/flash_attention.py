"""FLASH_ATTN (FA2, FA3): one causal flag a call, so a mixed batch may take two calls.

Single query tokens see the same either way, so a batch of spans and decodes is one non-causal call;
only causal pieces of several tokens need a second one.
"""

from typing import Any

import numpy as np
import torch
from vllm import envs
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

from hrm_vllm.attention import SpanSplitting, VirtualBatch, virtual_metadata


def select(batch: VirtualBatch, keep: np.ndarray) -> VirtualBatch:
    """The virtual sequences where `keep` (bool, (n,)) holds."""
    return VirtualBatch(*(getattr(batch, field)[keep] for field in VirtualBatch.__dataclass_fields__))


def token_indices(batch: VirtualBatch) -> np.ndarray:
    """int64: positions of the batch's query tokens in the flattened step."""
    return np.concatenate([np.arange(s, e, dtype=np.int64) for s, e in zip(batch.starts, batch.ends, strict=True)])


def flash_overrides(base: type[AttentionBackend]) -> dict[str, Any]:
    """Builder and implementation overrides of a FlashAttention backend."""
    builder = flash_builder(base.get_builder_cls())
    impl = flash_impl(base.get_impl_cls())
    return {"get_builder_cls": lambda: builder, "get_impl_cls": lambda: impl}


def flash_builder(base: Any) -> Any:
    """`base` with split batches: metadata of one call, or of two under `prefix_lm_calls`."""

    class PrefixLMFlashBuilder(SpanSplitting, base):
        def _unsplit(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
            # The same result for single queries, and FA3's faster kernel: 6% of a batch-1 step.
            return common.replace(causal=False) if common.max_query_len <= 1 else common

        def _build_split(self, common: CommonAttentionMetadata, batch: VirtualBatch, fast_build: bool) -> Any:
            several = (batch.ends - batch.starts) > 1
            causal_part = several & ~batch.bidirectional
            if not causal_part.any():
                return self._build_part(common, batch, causal=False)
            metadata = self._build_part(common, batch, causal=True)
            # Read by PrefixLMFlashImpl.forward in place of the metadata itself.
            metadata.prefix_lm_calls = [
                (
                    torch.from_numpy(token_indices(part)).to(metadata.seq_lens.device, non_blocking=True),
                    self._build_part(common, part, causal),
                )
                for part, causal in ((select(batch, ~causal_part), False), (select(batch, causal_part), True))
            ]
            return metadata

        def _build_part(self, common: CommonAttentionMetadata, batch: VirtualBatch, causal: bool) -> Any:
            # fast_build leaves out FA3's ahead-of-time schedule, whose buffer belongs to the captured graphs. Without
            # one of its own, every layer call of the step would make the same schedule again.
            virtual = virtual_metadata(common, batch, causal)
            metadata = base.build(self, 0, virtual, fast_build=True)
            if metadata.max_num_splits > 1:  # sized for the captured graphs; 1 is batch invariance's choice
                metadata.max_num_splits = 0
            metadata.scheduler_metadata = self._get_scheduler_metadata(
                aot_schedule=self.aot_schedule and not envs.VLLM_BATCH_INVARIANT,
                batch_size=virtual.num_reqs,
                cu_query_lens=virtual.query_start_loc,
                max_query_len=virtual.max_query_len,
                seqlens=virtual.seq_lens,
                max_seq_len=virtual.max_seq_len,
                causal=causal,
                max_num_splits=metadata.max_num_splits,
            )
            return metadata

    return PrefixLMFlashBuilder


def flash_impl(base: Any) -> Any:
    """`base` that runs `prefix_lm_calls` where the metadata has them, each on its own query tokens."""

    class PrefixLMFlashImpl(base):
        def forward(
            self,
            layer: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            output_scale: torch.Tensor | None = None,
            output_block_scale: torch.Tensor | None = None,
        ) -> torch.Tensor:
            calls = getattr(attn_metadata, "prefix_lm_calls", None)
            if calls is None:
                return super().forward(
                    layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
                )
            for tokens, metadata in calls:
                part = torch.empty_like(output[: len(tokens)])
                super().forward(
                    layer,
                    query[tokens],
                    key,
                    value,
                    kv_cache,
                    metadata,
                    part,
                    output_scale,
                    output_block_scale,
                )
                output[tokens] = part
            return output

    return PrefixLMFlashImpl
