"""Decode steps on the fused kernels, with SGLang's KV pool and block tables in the form that they take."""

import logging
from functools import partial
from typing import Any, Literal

import torch

from hrm_text.kernels.ahead import compile_ahead
from hrm_text.kernels.attention import DecodeBatch
from hrm_text.kernels.choice import choose, prepare
from hrm_text.kernels.decode import FusedDecode
from hrm_text.kernels.launch import check_option
from hrm_text.kernels.products import products_of_many
from hrm_text.model import HrmTextBody

logger = logging.getLogger("sglang.srt.hrm_sglang")


class Decoder:
    """Decides at the first step, when the weights are loaded, and stays with it.

    Args:
        body: of the model.

    Attributes:
        layers: SGLang's attention layer of each KV slot.
    """

    def __init__(self, body: HrmTextBody) -> None:
        check_option()  # so that a wrong one stops the engine as it starts
        prepare(body)
        self.body = body
        self.layers = body.attention_layers()
        self._decided = self._compiled = False
        self._fused: FusedDecode | None = None

    def chosen(self, device: torch.device) -> FusedDecode | None:
        """The kernels; None where SGLang's own layers have to run."""
        if not self._decided:
            self._decided = True
            dtype = next(self.body.parameters()).dtype
            self._fused = choose(
                self.body, dtype, device, "SGLang", _why_not(attention_backend("decode"), dtype), logger
            )
        return self._fused

    def cos_sin(self) -> torch.Tensor:
        """(positions, head_dim), [cos | sin] of each position."""
        return self.body.L_module.layers[0].self_attn.rotary_emb.cos_sin_cache

    def caches(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a KV slot, (tokens, 1, heads, head_dim) each."""
        k, v = attention_backend("decode").token_to_kv_pool.get_kv_buffer(slot)
        return k.unsqueeze(1), v.unsqueeze(1)

    def recur(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> torch.Tensor | None:
        """z_H after the last step; None where SGLang's own layers have to run the batch."""
        if not forward_batch.forward_mode.is_decode():
            return None
        fused = self.chosen(positions.device)
        if fused is None:
            return None
        table, row_starts, lengths = attention_backend("decode").decode_table()
        slots = forward_batch.out_cache_loc
        batch = DecodeBatch(positions, slots, table, row_starts, lengths, 1, self.cos_sin())
        if not self._compiled:  # with graphs that is the largest of them
            self._compiled = True
            many = partial(products_of_many, next(self.body.parameters()).dtype, positions.device)
            compile_ahead(fused, input_ids, batch, self.caches, len(positions), [many])
        return fused(input_ids, batch, self.caches)


def attention_backend(batches: Literal["prefill", "decode"]) -> Any:
    """SGLang's attention backend, of a pair the one for these batches."""
    from sglang.srt.model_executor.forward_context import get_attn_backend

    backend = get_attn_backend()
    return getattr(backend, f"{batches}_backend", backend)


def _why_not(backend: Any, dtype: torch.dtype) -> str | None:
    if not hasattr(backend, "decode_table"):
        return f"the attention backend {type(backend).__name__}"
    (k, _), (again, _) = (backend.token_to_kv_pool.get_kv_buffer(0) for _ in range(2))
    # A pool that hands out converted copies would lose what the kernels write.
    return None if k.dtype == dtype and k.data_ptr() == again.data_ptr() else "a quantised KV cache"
