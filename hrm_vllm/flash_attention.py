"""FLASH_ATTN (FA2, FA3): one causal flag a call, so a mixed batch may take several calls.

Single query tokens see the same either way, so a batch of spans and decodes is one non-causal call; only causal
pieces of several tokens need another one. Prompts that are all there (nothing cached, nothing to come) read their keys
and values where the step made them: FA3 fetches those by whole tiles, pages of 16 tokens line by line.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import envs
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils

from hrm_vllm.attention import SpanSplitting, VirtualBatch, virtual_metadata

MIN_UNPAGED_TOKENS = 2048  # beside other rows; fewer are not worth a call of their own


@dataclass(frozen=True)
class Call:
    """One call of the kernel.

    Attributes:
        tokens: of the step; indices where they do not follow one another.
        metadata: of the sequences in these tokens.
        unpaged: whether keys and values are those of these tokens.
    """

    tokens: slice | torch.Tensor
    metadata: Any
    unpaged: bool


def select(batch: VirtualBatch, keep: np.ndarray) -> VirtualBatch:
    """The virtual sequences where `keep` (bool, (n,)) holds."""
    return VirtualBatch(*(getattr(batch, field)[keep] for field in VirtualBatch.__dataclass_fields__))


def token_indices(batch: VirtualBatch) -> np.ndarray:
    """int64: positions of the batch's query tokens in the flattened step."""
    return np.concatenate([np.arange(s, e, dtype=np.int64) for s, e in zip(batch.starts, batch.ends, strict=True)])


def tokens_of(batch: VirtualBatch, keep: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """Where the query tokens of some sequences are in the flattened step, as an index."""
    part = select(batch, keep)
    if gathers(batch, keep):
        return torch.from_numpy(token_indices(part)).to(device, non_blocking=True)
    return slice(int(part.starts[0]), int(part.ends[-1]))


def kinds_of_calls(batch: VirtualBatch, unpaged: bool) -> list[tuple[np.ndarray, bool, bool]]:
    """(sequences, causal, unpaged) of each call that the batch takes, in order.

    The sequences of one kind need not follow one another. To gather their tokens would copy them at every layer, so
    the call for the most tokens comes first and takes all sequences; those of other kinds are then computed again.

    Args:
        batch: its virtual sequences.
        unpaged: whether the step's keys and values are as the cache has them.
    """
    lengths = batch.ends - batch.starts
    causal = (lengths > 1) & ~batch.bidirectional
    whole = batch.bidirectional & (batch.seq_ends == lengths)
    rest = ~causal & ~whole
    if not unpaged or (not whole.all() and lengths[whole].sum() < MIN_UNPAGED_TOKENS):
        rest, whole = rest | whole, np.zeros_like(whole)
    kinds = [(rest, False, False), (whole, False, True), (causal, True, False)]
    # A batch may end in padding without tokens.
    kinds = sorted((kind for kind in kinds if lengths[kind[0]].sum()), key=lambda kind: -lengths[kind[0]].sum())
    most, *others = kinds
    if gathers(batch, most[0]):
        most = (np.ones_like(most[0]), *most[1:])
    return [most, *others]


def gathers(batch: VirtualBatch, keep: np.ndarray) -> bool:
    """Whether other tokens lie between those of some sequences."""
    return not (batch.starts[keep][1:] == batch.ends[keep][:-1]).all()


def flash_overrides(base: type[AttentionBackend]) -> dict[str, Any]:
    """Builder and implementation overrides of a FlashAttention backend."""
    builder = flash_builder(base.get_builder_cls())
    impl = flash_impl(base.get_impl_cls())
    return {"get_builder_cls": lambda: builder, "get_impl_cls": lambda: impl}


def flash_builder(base: Any) -> Any:
    """`base` with the calls of split batches under `prefix_lm_calls`."""

    class PrefixLMFlashBuilder(SpanSplitting, base):
        def _unsplit(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
            # The same result for single queries, and FA3's faster kernel: 6% of a batch-1 step.
            return common.replace(causal=False) if common.max_query_len <= 1 else common

        def _build_split(self, common: CommonAttentionMetadata, batch: VirtualBatch, fast_build: bool) -> Any:
            # FA3 alone has such a schedule; FA2 and FA4 were not run.
            unpaged = self.aot_schedule and self.kv_cache_dtype in (torch.float16, torch.bfloat16)
            kinds = kinds_of_calls(batch, unpaged)
            device = common.seq_lens.device
            calls = [
                Call(tokens_of(batch, keep, device), self._build_part(common, select(batch, keep), causal), unpaged)
                for keep, causal, unpaged in kinds
            ]
            metadata = calls[0].metadata if len(calls) == 1 else self._build_part(common, batch, causal=False)
            metadata.prefix_lm_calls = calls  # read by PrefixLMFlashImpl.forward in place of the metadata itself
            metadata.prefix_lm_causal = None  # read by hrm_vllm.prefill_graphs, beside the metadata of every sequence
            if any(causal for _, causal, _ in kinds):
                tokens = np.repeat(~batch.bidirectional, batch.ends - batch.starts)
                metadata.prefix_lm_causal = torch.from_numpy(tokens).to(device, non_blocking=True)
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
            for call in calls:
                tokens, metadata = call.tokens, call.metadata
                out = torch.empty_like(output[: len(tokens)]) if isinstance(tokens, torch.Tensor) else output[tokens]
                if call.unpaged:
                    self._attend_unpaged(query[tokens], key[tokens], value[tokens], out, metadata)
                else:
                    scales = (output_scale, output_block_scale)
                    super().forward(layer, query[tokens], key, value, kv_cache, metadata, out, *scales)
                if isinstance(tokens, torch.Tensor):
                    output[tokens] = out
            return output

        def _attend_unpaged(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, metadata: Any
        ) -> None:
            fa_utils.flash_attn_varlen_func(  # not there on a CPU
                q=query,
                k=key,
                v=value,
                out=out,
                cu_seqlens_q=metadata.query_start_loc,
                cu_seqlens_k=metadata.query_start_loc,
                max_seqlen_q=metadata.max_query_len,
                max_seqlen_k=metadata.max_query_len,
                softmax_scale=self.scale,
                causal=False,
                num_splits=metadata.max_num_splits,
                fa_version=self.vllm_flash_attn_version,
            )

    return PrefixLMFlashImpl
