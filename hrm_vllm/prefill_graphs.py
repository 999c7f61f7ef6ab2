"""CUDA graphs of steps with prompts, with vLLM's FlashAttention; `hrm_text.kernels.prefill_graphs` has the rest."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends import fa_utils

from hrm_text.kernels.prefill import Attend, FusedPrefill
from hrm_text.kernels.prefill_graphs import SIZES, Kind, PrefillGraphs, Sequences, empty_inputs
from hrm_vllm.config import graph_sizes
from hrm_vllm.decode import Decoder

FLASH_VERSION = 3  # FA2's kernels for one query token cannot run others


def captured(prefill: FusedPrefill, decoder: Decoder, config: VllmConfig) -> PrefillGraphs | None:
    """Graphs of steps with prompts; None where the attention backend or the user has none."""
    layer, sizes = decoder.layers[0], sizes_for(config)
    if layer.attn_backend.get_name() != "FLASH_ATTN" or layer.impl.vllm_flash_attn_version != FLASH_VERSION:
        return None
    if not sizes:
        return None
    shape, page_size, longest = decoder.body.shape, decoder.page_size(), config.model_config.max_model_len
    count = min(sizes[-1], config.scheduler_config.max_num_seqs)

    def attention(sequences: Sequences, size: int, kind: Kind) -> Attend:
        # FA3's schedule, once for all layers.
        schedule = fa_utils.get_scheduler_metadata(
            batch_size=len(sequences.lengths),
            max_seqlen_q=size,
            max_seqlen_k=longest,
            num_heads_q=shape.num_heads,
            num_heads_kv=shape.num_heads,
            headdim=shape.head_dim,
            cache_seqlens=sequences.lengths,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=sequences.query_start,
            page_size=page_size,
            causal=kind == "causal",
        )

        def attend(slot: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k_cache, v_cache = decoder.caches(slot)
            return fa_utils.flash_attn_varlen_func(
                q=q,
                k=k_cache,
                v=v_cache,
                cu_seqlens_q=sequences.query_start,
                max_seqlen_q=size,
                seqused_k=sequences.lengths,
                max_seqlen_k=longest,
                block_table=sequences.table,
                scheduler_metadata=schedule,
                softmax_scale=shape.head_dim**-0.5,
                causal=kind == "causal",
                fa_version=FLASH_VERSION,
            )

        return attend

    inputs = empty_inputs(sizes[-1], count, longest, page_size, decoder.cos_sin)
    graphs = PrefillGraphs(prefill, *inputs, decoder.caches, attention, sizes)
    graphs.capture(current_platform.get_global_graph_pool())
    return graphs


def sequences_of(metadata: Any, tokens: int) -> Sequences:
    """What attention sees of a step of `tokens` tokens."""
    causal = getattr(metadata, "prefix_lm_causal", None)
    if causal is None and metadata.causal:
        causal = torch.ones(tokens, dtype=torch.bool, device=metadata.seq_lens.device)
    return Sequences(metadata.query_start_loc, metadata.seq_lens, metadata.block_table, causal)


def sizes_for(config: VllmConfig) -> list[int]:
    """Tokens of the steps to capture, ascending: what the user named for vLLM's own graphs, or `SIZES`."""
    named = sorted(config.compilation_config.cudagraph_capture_sizes or [])
    default = named == graph_sizes(2 * config.scheduler_config.max_num_seqs)
    return [size for size in (SIZES if default else named) if size <= config.scheduler_config.max_num_batched_tokens]
