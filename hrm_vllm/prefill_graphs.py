"""CUDA graphs of whole steps with prompts in them, for the sizes at which launching 1,300 kernels takes longest.

A graph has one attention call a layer, not causal, over sequences in buffers of its own: it runs every step without
causal pieces of several tokens. FA3 makes its schedule in the graph, once for all layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends import fa_utils

from hrm_vllm.config import graph_sizes
from hrm_vllm.decode import Decoder
from hrm_vllm.prefill import Prefiller

FLASH_VERSION = 3  # FA2's kernels for one query token cannot run others
# Where nobody names sizes. Up to 2,560 tokens a step takes longer to launch than to run; padding is cheap below 16.
SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2560)


@dataclass(frozen=True)
class Inputs:
    """What the graphs read: the step's tokens, and its sequences as attention wants them.

    Attributes:
        ids, positions, slots: (tokens,) each.
        query_start: int32 (sequences + 1,), offsets of their query tokens.
        lengths: int32 (sequences,), KV tokens that each sees.
        table: int32 (sequences, pages).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor

    @classmethod
    def empty(cls, tokens: int, sequences: int, pages: int, device: torch.device) -> "Inputs":
        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            ids=zeros(tokens, dtype=torch.int64),
            positions=zeros(tokens, dtype=torch.int64),
            slots=torch.full((tokens,), -1, dtype=torch.int64, device=device),
            query_start=zeros(sequences + 1),
            lengths=zeros(sequences),
            table=zeros(sequences, pages),
        )

    def fill(self, ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> None:
        """A step of fewer tokens and sequences; the rest is padding, whose KV is written nowhere."""
        tokens, sequences = len(ids), len(metadata.seq_lens)
        self.ids[:tokens].copy_(ids)
        self.positions[:tokens].copy_(positions)
        self.slots[:tokens].copy_(metadata.slot_mapping[:tokens])
        self.slots[tokens:].fill_(-1)
        self.query_start[: sequences + 1].copy_(metadata.query_start_loc)
        self.query_start[sequences + 1 :].fill_(tokens)
        self.lengths[:sequences].copy_(metadata.seq_lens)
        self.lengths[sequences:].fill_(0)
        pages = min(self.table.shape[1], metadata.block_table.shape[1])
        self.table[:sequences, :pages].copy_(metadata.block_table[:, :pages])


class PrefillGraphs:
    """Captures the sizes that vLLM captures decode steps of, and replays them.

    Args:
        prefiller: whose steps they are.
        decoder: of the same model.
        config: of the engine.
        device: where it runs.
    """

    def __init__(self, prefiller: Prefiller, decoder: Decoder, config: VllmConfig, device: torch.device) -> None:
        self._prefiller, self._decoder = prefiller, decoder
        self._sizes = sizes_for(config)
        self._max_length = config.model_config.max_model_len
        sequences = min(self._sizes[-1], config.scheduler_config.max_num_seqs)
        pages = -(-self._max_length // decoder.page_size())
        self._inputs = Inputs.empty(self._sizes[-1], sequences, pages, device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._caches = self._bound_caches()

    @staticmethod
    def why_not(decoder: Decoder, config: VllmConfig) -> str | None:
        """Why steps with prompts have no graphs; None when they can."""
        layer = decoder.layers[0]
        if layer.attn_backend.get_name() != "FLASH_ATTN" or layer.impl.vllm_flash_attn_version != FLASH_VERSION:
            return f"they need FlashAttention {FLASH_VERSION}"
        return None if sizes_for(config) else "no sizes to capture"

    def _bound_caches(self) -> list[tuple[int, torch.Size]]:
        layers = self._decoder.layers
        return [(layers[slot].kv_cache.data_ptr(), layers[slot].kv_cache.shape) for slot in (0, len(layers) - 1)]

    def stale(self) -> bool:
        """Whether vLLM has bound other KV caches since, as it does after its memory profile."""
        return self._caches != self._bound_caches()

    def capture(self) -> None:
        """Capture every size, the largest first, so that the others fit into its memory."""
        for size in reversed(self._sizes):
            self._run(size, one_layer=True)  # loads the kernels that cuBLAS has for this size
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=current_platform.get_global_graph_pool()):
                z_H = self._run(size)
            self._graphs[size] = graph, z_H

    def replay(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor | None:
        """z_H of a step, valid until the next; None where no graph runs it."""
        tokens, calls = len(input_ids), getattr(metadata, "prefix_lm_calls", ())
        if len(calls) != 1 or calls[0].metadata.causal or tokens > self._sizes[-1]:
            return None
        size = next(size for size in self._sizes if size >= tokens)
        if len(metadata.seq_lens) > self._sequences(size):
            return None
        graph, z_H = self._graphs[size]
        self._inputs.fill(input_ids, positions, calls[0].metadata)
        graph.replay()
        return z_H[:tokens]

    def _sequences(self, size: int) -> int:
        return min(size, len(self._inputs.lengths))

    def _run(self, size: int, one_layer: bool = False) -> torch.Tensor:
        inputs, shape, decoder = self._inputs, self._decoder.body.shape, self._decoder
        sequences = self._sequences(size)
        query_start, lengths = inputs.query_start[: sequences + 1], inputs.lengths[:sequences]
        schedule = fa_utils.get_scheduler_metadata(
            batch_size=sequences,
            max_seqlen_q=size,
            max_seqlen_k=self._max_length,
            num_heads_q=shape.num_heads,
            num_heads_kv=shape.num_heads,
            headdim=shape.head_dim,
            cache_seqlens=lengths,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=query_start,
            page_size=decoder.page_size(),
            causal=False,
        )

        def attend(slot: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
            k_cache, v_cache = decoder.caches(slot)
            fa_utils.flash_attn_varlen_func(
                q=q,
                k=k_cache,
                v=v_cache,
                out=out,
                cu_seqlens_q=query_start,
                max_seqlen_q=size,
                seqused_k=lengths,
                max_seqlen_k=self._max_length,
                block_table=inputs.table[:sequences],
                scheduler_metadata=schedule,
                softmax_scale=shape.head_dim**-0.5,
                causal=False,
                fa_version=FLASH_VERSION,
            )

        step = inputs.ids[:size], inputs.positions[:size], inputs.slots[:size]
        return self._prefiller.run(*step, attend, one_layer)


def sizes_for(config: VllmConfig) -> list[int]:
    """Tokens of the steps to capture, ascending: the sizes that the user named for vLLM's own graphs, or `SIZES`."""
    named = config.compilation_config.cudagraph_capture_sizes or []
    default = named == graph_sizes(2 * config.scheduler_config.max_num_seqs)
    return [
        size for size in (SIZES if default else sorted(named)) if size <= config.scheduler_config.max_num_batched_tokens
    ]
