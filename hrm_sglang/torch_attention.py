"""The torch_native backend with PrefixLM spans: slow, for CPUs and tests."""

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

from hrm_sglang.attention import VirtualSequence, cut_batch


class PrefixLMTorchBackend(TorchNativeAttnBackend):
    """SGLang 0.5.23's torch_native backend; an extend batch with spans runs one SDPA a virtual sequence."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._cut: list[VirtualSequence] | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._cut = cut_batch(forward_batch)

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self._cut is None:
            return super()._run_sdpa_forward_extend(
                query, output, k_cache, v_cache, req_to_token, req_pool_indices, *args, **kwargs
            )
        for sequence in self._cut:
            slots = req_to_token[req_pool_indices[sequence.row], : sequence.kv_end]
            length = sequence.last - sequence.first
            mask = torch.ones(length, sequence.kv_end, dtype=torch.bool, device=query.device)
            if not sequence.bidirectional:
                mask = mask.tril_(sequence.prefix)
            q = query[sequence.first : sequence.last].movedim(0, 1)
            k, v = (cache[slots].movedim(0, 1).to(query.dtype) for cache in (k_cache, v_cache))
            out = scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, scale=kwargs.get("scaling"), enable_gqa=False
            )
            output[sequence.first : sequence.last] = out[0].movedim(0, 1)
        return output
