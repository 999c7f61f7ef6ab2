"""Steps with prompts in them on the fused kernels: vLLM's attention, and our kernels between its GEMMs.

Nothing is compiled for it by torch, which `hrm_vllm.config` leaves off where it finds that this will run. Steps of few
tokens replay CUDA graphs of the whole model (`hrm_vllm.prefill_graphs`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available

from hrm_vllm.decode import Decoder

if TYPE_CHECKING:
    from hrm_text.kernels.prefill import FusedPrefill
    from hrm_vllm.prefill_graphs import PrefillGraphs


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
        self._graphs: PrefillGraphs | None = None

    def recur(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """z_H after the last step; None where vLLM's own layers have to run the batch."""
        by_layer = get_forward_context().attn_metadata if is_forward_context_available() else None
        if not isinstance(by_layer, dict) or not self.on(positions.device):  # a dry run; a list with microbatches
            return None
        layers = self._decoder.layers
        metadata = by_layer[layers[0].layer_name]
        if self._graphs is not None and self._graphs.stale():
            self._graphs = None
        if self._graphs is not None:
            z_H = self._graphs.replay(input_ids, positions, metadata)
            if z_H is not None:
                return z_H

        def attend(slot: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
            layer = layers[slot]
            layer.impl.forward(layer, q, k, v, layer.kv_cache, metadata, out)

        return self.run(input_ids, positions, metadata.slot_mapping, attend)

    def on(self, device: torch.device) -> bool:
        """Whether this runs steps at all."""
        if self._compiles:
            return False
        self._decoder.decide(device)
        return self._decoder.fused is not None

    def capture(self, device: torch.device) -> None:
        """Capture graphs, if this runs steps here, and drop those there were."""
        if not self.on(device):
            return
        from hrm_vllm.prefill_graphs import PrefillGraphs

        self._graphs = None
        if PrefillGraphs.why_not(self._decoder, self._config) is None:
            graphs = PrefillGraphs(self, self._decoder, self._config, device)
            graphs.capture()
            self._graphs = graphs

    def run(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        attend: Callable[..., None],
        one_layer: bool = False,
    ) -> torch.Tensor:
        """z_H after the last step.

        Args:
            input_ids, positions, slots: (tokens,) each; a negative KV slot is padding's.
            attend: attention of a layer, as `FusedPrefill` takes it.
            one_layer: run no other; the result means nothing.
        """
        from hrm_text.kernels.pointwise import PrefillBatch
        from hrm_text.kernels.prefill import FusedPrefill

        decoder, body = self._decoder, self._decoder.body
        if self._prefill is None:
            self._prefill = FusedPrefill(body)
        batch = PrefillBatch(positions, slots, decoder.page_size(), decoder.cos_sin)
        z_H, z_L = body.begin(body.embed(input_ids))
        run = self._prefill.one_layer if one_layer else self._prefill
        return run(z_H, z_L, batch, decoder.caches, attend)
