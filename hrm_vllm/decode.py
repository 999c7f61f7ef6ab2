"""Decode steps on the fused kernels, with vLLM's KV cache and block tables in the form that they take.

The branch lies outside the module that vLLM compiles, in the forward pass that it captures: Model Runner V2 records
its FULL graphs around the whole model, and the tensors of their metadata are the runner's persistent buffers. Its
PIECEWISE graphs, and the dry runs that warm them up, stay with vLLM's own layers.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger

from hrm_text.kernels.choice import choose, prepare
from hrm_text.kernels.launch import check_option
from hrm_text.model import HrmTextBody

if TYPE_CHECKING:
    from hrm_text.kernels.decode import FusedDecode

logger = init_logger("vllm.hrm_vllm")

# Their KV cache is (pages, heads, page_size, [key | value]); CPU_ATTN keeps keys by column.
BACKENDS: tuple[str, ...] = ("FLASH_ATTN", "TRITON_ATTN")


class Decoder:
    """Decides at the first step, when weights are loaded and caches bound, and stays with it.

    Args:
        body: of the model.
        config: of the engine.

    Attributes:
        layers: vLLM's attention layer of each KV slot.
        fused: the kernels; None where vLLM's own layers have to run, and before `decide`.
        cos_sin: (positions, head_dim), which captured graphs read; there once `decide` chose the kernels.
    """

    def __init__(self, body: HrmTextBody, config: VllmConfig) -> None:
        check_option()  # so that a wrong one stops the engine as it starts
        if why_not_config(config) is None:
            prepare(body)
        self.body = body
        self.layers = body.attention_layers()
        self.fused: FusedDecode | None = None
        self._config = config
        self._decided = self._compiled = False

    def recur(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """z_H after the last step; None where vLLM's own layers have to run the batch."""
        if self._decided and self.fused is None:
            return None
        metadata = self.metadata()
        if not getattr(metadata, "prefix_lm_decode", False):  # more than a query token a request, or a dry run
            return None
        self.decide(positions.device)
        piecewise = get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
        if self.fused is None or piecewise or len(metadata.seq_lens) != len(positions):
            return None
        from hrm_text.kernels.attention import DecodeBatch

        batch = DecodeBatch(
            positions=positions,
            write_slots=metadata.slot_mapping,
            table=metadata.block_table,
            row_starts=None,
            lengths=metadata.seq_lens,
            page_size=self.page_size(),
            cos_sin=self.cos_sin,
        )
        if not self._compiled:
            from hrm_text.kernels.ahead import compile_ahead
            from hrm_vllm.sampler_kernels import top_k_top_p_calls

            self._compiled = True
            config, most = self._config, self._config.scheduler_config.max_num_seqs
            warm = config.kernel_config.enable_jit_warmup
            others = top_k_top_p_calls(config.model_config.get_vocab_size(), most) if warm else []
            compile_ahead(self.fused, input_ids, batch, self.caches, most, others)
        return self.fused(input_ids, batch, self.caches)

    def metadata(self) -> Any:
        """Attention metadata of the step; None where there is none, or not one of the whole batch."""
        if not is_forward_context_available():
            return None
        by_layer = get_forward_context().attn_metadata
        if not isinstance(by_layer, dict):  # None in the profile run, a list with microbatches
            return None
        return by_layer.get(next(iter(self.layers.values())).layer_name)

    def decide(self, device: torch.device) -> None:
        """Choose the kernels or vLLM's layers, once."""
        if self._decided:
            return
        self._decided = True
        dtype = self._config.model_config.dtype
        reason = why_not(self._config, list(self.layers.values()), dtype)
        self.fused = choose(self.body, dtype, device, "vLLM", reason, logger)
        # Held here, because captured graphs read it and vLLM's layer may replace its own.
        self.cos_sin = self.body.L_module.layers[0].self_attn.rotary_emb.cos_sin_cache

    def page_size(self) -> int:
        """Tokens a page of the KV cache."""
        return next(iter(self.layers.values())).kv_cache.shape[2]

    def caches(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a KV slot, (pages, page_size, heads, head_dim) each."""
        # Asked for anew each time: vLLM binds other caches after its memory profile.
        cache = self.layers[slot].kv_cache
        k, v = cache.transpose(1, 2).split(self.body.shape.head_dim, dim=-1)
        return k, v


def why_not(config: VllmConfig, layers: list[Any], dtype: torch.dtype) -> str | None:
    """Why decode steps of an engine cannot run on the fused kernels; None when they can.

    What `hrm_vllm.config` refuses (KV transfer, context parallelism, microbatches) does not get here; what the
    weights forbid (tensor and pipeline parallelism, quantisation) is `hrm_text.kernels.decode.why_not`'s.
    """
    cache = layers[0].kv_cache
    backend = layers[0].attn_backend.get_name()
    reason = why_not_config(config)
    if reason is not None:
        return reason
    if backend not in BACKENDS:
        return f"the attention backend {backend}"
    if any(layer.sliding_window is not None for layer in layers):
        return "a sliding window"
    if any(layer.kv_cache.dtype != dtype for layer in layers):
        return f"a KV cache of {config.cache_config.cache_dtype}"
    if cache.ndim != 4 or cache.shape[3] != 2 * layers[0].head_size or cache.stride(3) != 1:
        return f"a KV cache of shape {tuple(cache.shape)} and strides {cache.stride()}"
    return None


def why_not_config(config: VllmConfig) -> str | None:
    """The part of `why_not` that is known before the model is there."""
    mode = config.compilation_config.cudagraph_mode
    if config.speculative_config is not None:
        return "speculative decoding, whose graphs verify several tokens a request"
    if mode is not None and mode.decode_mode() == CUDAGraphMode.PIECEWISE:
        return f"cudagraph_mode={mode.name}"
    if config.lora_config is not None:
        return "LoRA"
    if config.parallel_config.data_parallel_size > 1:
        return "data parallelism"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT=1"
    return None
