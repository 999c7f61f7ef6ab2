"""vLLM's layers, in the form that `hrm_text.model` asks for."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.v1.attention.selector import get_attn_backend

from hrm_text.config import HrmTextShape
from hrm_vllm.attention import prefix_lm_backend


class PagedAttention(nn.Module):
    """vLLM's attention over one KV slot, with the PrefixLM backend."""

    def __init__(self, num_heads: int, head_dim: int, config: VllmConfig, prefix: str) -> None:
        super().__init__()
        cache = config.cache_config
        backend = get_attn_backend(head_dim, torch.get_default_dtype(), cache.cache_dtype)
        self.attn = Attention(
            num_heads=num_heads,
            head_size=head_dim,
            scale=head_dim**-0.5,
            num_kv_heads=num_heads,
            cache_config=cache,
            quant_config=config.quant_config,
            prefix=prefix,
            attn_backend=prefix_lm_backend(backend),
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Any) -> torch.Tensor:
        return self.attn(q, k, v)


class VllmLayers:
    """`hrm_text.model.EngineLayers` for vLLM."""

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        self.quant = config.quant_config
        self.tp_size = get_tensor_model_parallel_world_size()

    def column_linear(self, in_features: int, out_features: list[int], prefix: str) -> nn.Module:
        return MergedColumnParallelLinear(in_features, out_features, bias=False, quant_config=self.quant, prefix=prefix)

    def row_linear(self, in_features: int, out_features: int, prefix: str) -> nn.Module:
        return RowParallelLinear(in_features, out_features, bias=False, quant_config=self.quant, prefix=prefix)

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        return VocabParallelEmbedding(vocab_size, hidden_size, quant_config=self.quant, prefix=prefix)

    def rms_norm(self, hidden_size: int, eps: float) -> nn.Module:
        return RMSNorm(hidden_size, eps=eps, has_weight=False)

    def rope(self, shape: HrmTextShape) -> nn.Module:
        parameters = {"rope_type": "default", "rope_theta": shape.rope_theta}
        return get_rope(shape.head_dim, max_position=shape.max_positions, rope_parameters=parameters)

    def swiglu(self) -> nn.Module:
        return SiluAndMul()

    def attention(self, num_heads: int, head_dim: int, slot: int, prefix: str) -> nn.Module:
        return PagedAttention(num_heads, head_dim, self.config, prefix)
