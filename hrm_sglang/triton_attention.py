"""The Triton backend with PrefixLM spans."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

from hrm_sglang.attention import VirtualSequence, computed_again, cut_batch
from hrm_sglang.compat import fill_kv_slots


@dataclass(frozen=True)
class Launch:
    """One kernel call over virtual sequences.

    Attributes:
        tokens: int64, the query tokens it computes, in order; None for the whole batch.
        causal: its flag.
        qo_indptr, kv_indptr: offsets of the sequences' query tokens and of their prefixes' KV slots.
        kv_indices: int64, those slots.
        lengths: query tokens of each sequence.
    """

    tokens: torch.Tensor | None
    causal: bool
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    lengths: list[int]


class PrefixLMTritonBackend(TritonAttnBackend):
    """SGLang 0.5.23's Triton backend; an extend batch with spans runs as virtual sequences.

    The extend kernel reads a sequence's own keys from the batch and its prefix from the KV pool, where the
    step's keys already are, so a later piece finds an earlier one there. One non-causal launch computes
    every piece; causal pieces of several tokens are then computed again by a causal one.
    """

    extend_attention_fwd: Any

    def __init__(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(runner, *args, **kwargs)
        if self.enable_deterministic or self.dcp_size > 1:
            raise ValueError("HRM-Text: deterministic inference and DCP take other extend kernels of Triton's")
        self._launches: list[Launch] = []
        self._stock_extend = self.extend_attention_fwd
        self.extend_attention_fwd = self._extend

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        cut = cut_batch(forward_batch)
        if cut is None:
            self._launches = []
            return
        again, tokens = computed_again(cut)
        self._launches = [self._plan(forward_batch, cut, None, False)]
        if again:
            self._launches.append(self._plan(forward_batch, again, tokens.to(self.device), True))

    def decode_table(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """For `hrm_sglang.decode`: KV slots in one list, with the offsets of the rows."""
        return self.forward_metadata.kv_indices, self.forward_metadata.kv_indptr, None

    def _plan(
        self, forward_batch: Any, cut: Sequence[VirtualSequence], tokens: torch.Tensor | None, causal: bool
    ) -> Launch:
        lengths = [sequence.last - sequence.first for sequence in cut]
        prefixes = torch.tensor([sequence.prefix for sequence in cut], dtype=torch.int32, device=self.device)
        rows = torch.tensor([sequence.row for sequence in cut], dtype=torch.int64, device=self.device)
        kv_indices = torch.empty(sum(sequence.prefix for sequence in cut) or 1, dtype=torch.int64, device=self.device)
        kv_indptr = torch.zeros(len(cut) + 1, dtype=torch.int32, device=self.device)
        fill_kv_slots(self, forward_batch, forward_batch.req_pool_indices[rows], prefixes, kv_indptr, kv_indices)
        qo_indptr = torch.zeros(len(cut) + 1, dtype=torch.int64)
        qo_indptr[1:] = torch.tensor(lengths).cumsum(0)
        return Launch(tokens, causal, qo_indptr.to(self.device), kv_indptr, kv_indices, lengths)

    def _extend(self, q: Any, k: Any, v: Any, o: Any, *args: Any, **kwargs: Any) -> None:
        """In place of `extend_attention_fwd`, whose arguments after o are, in 0.5.23:

        k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, custom_mask, is_causal, mask_indptr, max_len, ...
        """
        if not self._launches:
            self._stock_extend(q, k, v, o, *args, **kwargs)
            return
        k_buffer, v_buffer, _, _, _, mask, _, mask_indptr, _, *rest = args
        for launch in self._launches:
            if "extend_seq_lens_cpu" in kwargs:
                kwargs["extend_seq_lens_cpu"] = launch.lengths
            pick = launch.tokens
            out = o if pick is None else torch.empty_like(o[: len(pick)])
            self._stock_extend(
                *((q, k, v) if pick is None else (q[pick], k[pick], v[pick])),
                out,
                k_buffer,
                v_buffer,
                launch.qo_indptr,
                launch.kv_indptr,
                launch.kv_indices,
                mask,
                launch.causal,
                mask_indptr,
                max(launch.lengths),
                *rest,
                **kwargs,
            )
            if pick is not None:
                o[pick] = out
