"""SGLang's layers, in the form that `hrm_text.model` asks for (SGLang 0.5.23)."""

from typing import Any

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.runtime_context import get_parallel
from torch import nn

from hrm_text.config import HrmTextShape


class SlotAttention(nn.Module):
    """Attention over one KV slot; which tokens see which is the attention backend's business."""

    def __init__(self, num_heads: int, head_dim: int, slot: int, quant: Any, prefix: str) -> None:
        super().__init__()
        self.attn = RadixAttention(
            num_heads=num_heads,
            head_dim=head_dim,
            scaling=head_dim**-0.5,
            num_kv_heads=num_heads,
            layer_id=slot,
            quant_config=quant,
            prefix=prefix,
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Any) -> torch.Tensor:
        return self.attn(q, k, v, context)


def in_any_dtype(op: Any) -> nn.Module:
    """`op`, in PyTorch where the model is float32: SGLang's CUDA kernels of these ops know half precision only."""
    if torch.get_default_dtype() == torch.float32:
        op._forward_method = op.forward_native
    return op


class SglangLayers:
    """`hrm_text.model.EngineLayers` for SGLang; the context of a forward pass is its ForwardBatch."""

    def __init__(self, quant: Any) -> None:
        self.quant = quant
        self.tp_size = get_parallel().tp_size

    def column_linear(self, in_features: int, out_features: list[int], prefix: str) -> nn.Module:
        return MergedColumnParallelLinear(in_features, out_features, bias=False, quant_config=self.quant, prefix=prefix)

    def row_linear(self, in_features: int, out_features: int, prefix: str) -> nn.Module:
        return RowParallelLinear(in_features, out_features, bias=False, quant_config=self.quant, prefix=prefix)

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        return VocabParallelEmbedding(vocab_size, hidden_size, quant_config=self.quant, prefix=prefix)

    def rms_norm(self, hidden_size: int, eps: float) -> nn.Module:
        return in_any_dtype(RMSNorm(hidden_size, eps=eps, has_weight=False))

    def rope(self, shape: HrmTextShape) -> nn.Module:
        rope = get_rope(
            head_size=shape.head_dim,
            rotary_dim=shape.head_dim,
            max_position=shape.max_positions,
            base=shape.rope_theta,
            is_neox_style=True,
        )
        return in_any_dtype(rope)

    def swiglu(self) -> nn.Module:
        return in_any_dtype(SiluAndMul())

    def attention(self, num_heads: int, head_dim: int, slot: int, prefix: str) -> nn.Module:
        return SlotAttention(num_heads, head_dim, slot, self.quant, prefix)
