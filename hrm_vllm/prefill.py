"""Steps with prompts in them on the fused kernels: vLLM's attention, and our kernels between its GEMMs.

Nothing is compiled for it by torch, which `hrm_vllm.config` leaves off where it finds that this will run. Steps of few
tokens replay CUDA graphs of the whole model (`hrm_vllm.prefill_graphs`).
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from hrm_text.kernels.launch import why_off
from hrm_vllm.decode import Decoder, why_not_config

if TYPE_CHECKING:
    from hrm_text.kernels.prefill import FusedPrefill
    from hrm_text.kernels.prefill_graphs import PrefillGraphs

logger = init_logger("vllm.hrm_vllm")


def prepare_many_tokens(config: VllmConfig) -> None:
    """Have quack imported and compiled in the background, where steps of many tokens will run on it.

    For an engine whose graphs are captured. It takes some seconds, which no start should wait for; a first step of many
    tokens waits for what is left of them.
    """
    alone = config.parallel_config.world_size == 1  # the model is in this process
    if alone and config.compilation_config.mode == CompilationMode.NONE and why_not_config(config) is None:
        device = torch.device(current_platform.device_type)
        if why_off(device) is None:
            from hrm_text.kernels.products import begin

            begin(config.model_config.dtype, device)


class Prefiller:
    """Runs what the decoder left, where its kernels are on and torch.compile is off.

    Args:
        decoder: of the same model; decides for both.
        config: of the engine.
    """

    def __init__(self, decoder: Decoder, config: VllmConfig) -> None:
        self._decoder = decoder
        self._config = config
        self._compiles = config.compilation_config.mode != CompilationMode.NONE
        self._prefill: FusedPrefill | None = None
        self.graphs: PrefillGraphs | None = None

    def recur(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """z_H after the last step; None where vLLM's own layers have to run the batch."""
        metadata = self._decoder.metadata()
        prefill = None if metadata is None else self._chosen(positions.device)
        if prefill is None:
            return None
        from hrm_text.kernels.pointwise import PrefillBatch

        decoder, layers = self._decoder, self._decoder.layers
        replayed = self._replayed(input_ids, positions, metadata)
        if replayed is not None:
            return replayed

        def attend(slot: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            layer, out = layers[slot], torch.empty(q.shape, dtype=q.dtype, device=q.device)
            return layer.impl.forward(layer, q, k, v, layer.kv_cache, metadata, out)

        batch = PrefillBatch(positions, metadata.slot_mapping, decoder.page_size(), decoder.cos_sin)
        z_H, z_L = decoder.body.begin(decoder.body.embed(input_ids))
        return prefill(z_H, z_L, batch, decoder.caches, attend, getattr(metadata, "prefix_lm_read", None))

    def _replayed(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> torch.Tensor | None:
        if self.graphs is None:
            return None
        if self.graphs.stale():
            self.graphs = None
            return None
        from hrm_vllm.prefill_graphs import sequences_of

        tokens = len(input_ids)
        sequences = sequences_of(metadata, tokens)
        return self.graphs.replay(input_ids, positions, metadata.slot_mapping[:tokens], sequences)

    def _chosen(self, device: torch.device) -> "FusedPrefill | None":
        if self._compiles:
            return None
        self._decoder.decide(device)
        if self._prefill is None and self._decoder.fused is not None:
            from hrm_text.kernels.prefill import FusedPrefill

            self._prefill = FusedPrefill(self._decoder.body)
        return self._prefill

    def capture(self, device: torch.device) -> None:
        """Capture graphs, if this runs steps here and there is memory for them, and drop those there were."""
        prefill = self._chosen(device)
        if prefill is None:
            return
        from hrm_vllm.prefill_graphs import captured

        self.graphs = None
        try:
            self.graphs = captured(prefill, self._decoder, self._config)
        except RuntimeError as error:  # also out of memory, and CUDA's errors
            logger.warning("HRM-Text: no graphs of steps with prompts, which take longer to launch without: %s", error)
        else:
            logger.info("HRM-Text: %s", self.graphs or "no graphs of steps with prompts here")
