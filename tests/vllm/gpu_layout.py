"""Stand-ins with which an engine on a CPU can run the fused kernels: its KV cache and weights as GPUs keep them.

CPU_ATTN stores keys by column and its linear layers keep only a packed copy of their weights. Here attention is a
plain torch function over FLASH_ATTN's layout, and weights stay; scheduling, block tables and metadata are vLLM's.
"""

from typing import Any

import torch


def apply() -> None:
    """Put the stand-ins into this process, before its engine starts."""
    from vllm.model_executor.layers import utils
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from hrm_vllm import decode

    CPUAttentionBackendImpl.forward = attend
    CPUAttentionBackendImpl.do_kv_cache_update = write
    pack = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: pack(layer, remove_weight=False)
    decode.BACKENDS = (*decode.BACKENDS, "CPU_ATTN")


def write(
    self: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """`kv_cache` is (pages, heads, page_size, [key | value])."""
    page_size = kv_cache.shape[2]
    slots = slots[: len(key)]
    kv_cache[slots // page_size, :, slots % page_size] = torch.cat([key, value], -1)


def attend(
    self: Any,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: Any,
    output: torch.Tensor,
    **scales: Any,
) -> torch.Tensor:
    """Each sequence's queries are its last tokens; `dynamic_causal` has a flag for each sequence."""
    if metadata is None:
        return output
    starts = metadata.query_start_loc.tolist()
    for row, length in enumerate(metadata.seq_lens.tolist()):
        first, last = starts[row], starts[row + 1]
        pages = kv_cache[metadata.block_table[row].long()].transpose(1, 2).flatten(0, 1)[:length]
        keys, values = (part.transpose(0, 1) for part in pages.chunk(2, -1))
        causal = metadata.causal if metadata.dynamic_causal is None else bool(metadata.dynamic_causal[row])
        seen = torch.ones(last - first, length, dtype=torch.bool)
        if causal:
            seen = seen.tril(length - (last - first))
        out = torch.nn.functional.scaled_dot_product_attention(
            query[first:last].transpose(0, 1), keys, values, attn_mask=seen, scale=self.scale
        )
        output[first:last] = out.transpose(0, 1)
    return output
