"""The FA3 backend with PrefixLM spans."""

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend, FlashAttentionMetadata
from sglang.srt.layers.radix_attention import AttentionType

from hrm_sglang.attention import VirtualSequence, computed_again, cut_batch
from hrm_text.kernels.prefill_graphs import Kind, Sequences


class PrefixLMFlashBackend(FlashAttentionBackend):
    """SGLang 0.5.23's FA3 backend; an extend batch with spans runs as virtual sequences.

    FA3 has one causal flag a call, which the stock backend reads from the layer's type. So a first call,
    non-causal, computes every piece and writes the KV; causal pieces of several tokens are then computed
    again by a causal one.
    """

    forward_metadata: Any

    def __init__(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(runner, *args, **kwargs)
        self._pieces: FlashAttentionMetadata | None = None
        self._again: tuple[torch.Tensor, FlashAttentionMetadata] | None = None
        self._unpaged = False  # whether every piece is a span without a context, so that the step has all of its KV

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._pieces = self._again = None
        cut = cut_batch(forward_batch)
        if cut is None:
            return
        self._pieces = self._metadata(cut)
        self._unpaged = all(piece.bidirectional and piece.prefix == 0 for piece in cut)
        again, tokens = computed_again(cut)
        if again:
            self._again = tokens.to(self.device), self._metadata(again)

    def decode_table(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """For `hrm_sglang.decode`: a row of KV slots for each request, and the context lengths."""
        return self.forward_metadata.page_table, None, self.forward_metadata.cache_seqlens_int32

    def _metadata(self, cut: Sequence[VirtualSequence]) -> FlashAttentionMetadata:
        stock = self.forward_metadata

        def to_device(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        lengths = to_device([0, *(sequence.last - sequence.first for sequence in cut)])
        ends = to_device([0, *(sequence.kv_end for sequence in cut)])
        return FlashAttentionMetadata(
            cache_seqlens_int32=ends[1:],
            max_seq_len_q=max(sequence.last - sequence.first for sequence in cut),
            max_seq_len_k=max(sequence.kv_end for sequence in cut),
            cu_seqlens_q=lengths.cumsum(0, dtype=torch.int32),
            cu_seqlens_k=ends.cumsum(0, dtype=torch.int32),
            page_table=stock.page_table[to_device([sequence.row for sequence in cut]).long()],
        )

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        if self._pieces is None or not forward_batch.forward_mode.is_extend_without_speculative():
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if self._unpaged and not save_kv_cache:  # pages of one token are slower to read
            return self._attend_to_own(q, k, v, self._pieces.cu_seqlens_q, self._pieces.max_seq_len_q)
        stock, kind = self.forward_metadata, layer.attn_type
        try:
            self.forward_metadata, layer.attn_type = self._pieces, AttentionType.DECODER_BIDIRECTIONAL
            out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            if self._again is not None:
                tokens, metadata = self._again
                self.forward_metadata, layer.attn_type = metadata, kind
                rows = super().forward_extend(q[tokens], k[tokens], v[tokens], layer, forward_batch, False, **kwargs)
                out[tokens] = rows.view(len(tokens), *out.shape[1:])
            return out
        finally:
            self.forward_metadata, layer.attn_type = stock, kind

    def _attend_to_own(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int
    ) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5
        return self.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, softmax_scale=scale)

    def sequences(self, tokens: int) -> Sequences:
        """For `hrm_text.kernels.prefill_graphs`: what attention sees of an extend batch of `tokens` tokens."""
        pieces = self._pieces
        if pieces is None:
            own, causal = self.forward_metadata, torch.ones(tokens, dtype=torch.bool, device=self.device)
        elif self._again is None:
            own, causal = pieces, None
        else:
            own, causal = pieces, torch.zeros(tokens, dtype=torch.bool, device=self.device)
            causal[self._again[0]] = True
        fresh = pieces is not None and self._unpaged
        return Sequences(own.cu_seqlens_q, own.cache_seqlens_int32, own.page_table, causal, fresh)

    def attend(
        self,
        slot: int,
        step: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sequences: Sequences,
        longest: int,
        kind: Kind,
    ) -> torch.Tensor:
        """Attention of a step's (tokens, heads, head_dim) q, k and v, at most `longest` of a sequence, over its KV."""
        q, k, v = step
        if kind == "fresh":
            return self._attend_to_own(q, k, v, sequences.query_start, longest)
        k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(slot)
        return self.flash_attn_with_kvcache(
            q=q,
            k_cache=k_cache.unsqueeze(1),
            v_cache=v_cache.unsqueeze(1),
            page_table=sequences.table,
            cache_seqlens=sequences.lengths,
            cu_seqlens_q=sequences.query_start,
            max_seqlen_q=longest,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=kind == "causal",
            num_splits=self.num_splits,
        )
