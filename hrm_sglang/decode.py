"""Decode steps on the fused kernels, with SGLang's KV pool and block tables in the form that they take."""

import logging
from typing import Any

import torch

from hrm_text.kernels.ahead import compile_ahead
from hrm_text.kernels.attention import DecodeBatch
from hrm_text.kernels.choice import choose
from hrm_text.kernels.decode import FusedDecode
from hrm_text.kernels.launch import check_option
from hrm_text.model import HrmTextBody

logger = logging.getLogger("sglang.srt.hrm_sglang")


class Decoder:
    """Decides at the first decode step, when the weights are loaded, and stays with it.

    Args:
        body: of the model.
    """

    def __init__(self, body: HrmTextBody) -> None:
        check_option()  # so that a wrong one stops the engine as it starts
        self._body = body
        self._decided = False
        self.fused: FusedDecode | None = None

    def recur(
        self, positions: torch.Tensor, z_H: torch.Tensor, z_L: torch.Tensor, forward_batch: Any
    ) -> torch.Tensor | None:
        """z_H after the last step; None where SGLang's own layers have to run the batch."""
        if not forward_batch.forward_mode.is_decode():
            return None
        backend = _backend()
        first, self._decided = not self._decided, True
        if first:
            reason = _why_not(backend, z_H.dtype)
            self.fused = choose(self._body, z_H.dtype, z_H.device, "SGLang", reason, logger)
        if self.fused is None:
            return None
        table, row_starts, lengths = backend.decode_table()
        rope = self._body.L_module.layers[0].self_attn.rotary_emb
        batch = DecodeBatch(positions, forward_batch.out_cache_loc, table, row_starts, lengths, 1, rope.cos_sin_cache)

        def caches(slot: int) -> tuple[torch.Tensor, torch.Tensor]:
            k, v = backend.token_to_kv_pool.get_kv_buffer(slot)
            return k.unsqueeze(1), v.unsqueeze(1)

        if first:  # with graphs that is the largest of them
            compile_ahead(self.fused, batch, caches, len(positions))
        return self.fused(z_H, z_L, batch, caches)


def _backend() -> Any:
    from sglang.srt.model_executor.forward_context import get_attn_backend

    backend = get_attn_backend()
    # Of a pair for prefill and decode, the one for decode.
    return getattr(backend, "decode_backend", backend)


def _why_not(backend: Any, dtype: torch.dtype) -> str | None:
    if not hasattr(backend, "decode_table"):
        return f"the attention backend {type(backend).__name__}"
    (k, _), (again, _) = (backend.token_to_kv_pool.get_kv_buffer(0) for _ in range(2))
    # A pool that hands out converted copies would lose what the kernels write.
    return None if k.dtype == dtype and k.data_ptr() == again.data_ptr() else "a quantised KV cache"
