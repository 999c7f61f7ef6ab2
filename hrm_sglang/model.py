"""`HrmTextForCausalLM` for SGLang: the shared forward with SGLang's layers."""

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

from hrm_sglang.decode import Decoder
from hrm_sglang.layers import SglangLayers
from hrm_sglang.prefill import Prefiller
from hrm_text.config import HrmTextShape, read_config
from hrm_text.lora import parts_of, sizes
from hrm_text.model import HrmTextBody
from hrm_text.weights import PACKED_MODULES, load_into


class HrmTextForCausalLM(nn.Module):
    """HRM-Text with its LM head; replaces SGLang's in-tree class of the same name (SGLang 0.5.23)."""

    packed_modules_mapping = PACKED_MODULES
    # Compiled, a decode step would trace through the fused kernels and 128 layer calls; SGLang reads this.
    _can_torch_compile = False

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        self.quant_config = quant_config
        self.shape: HrmTextShape = read_config(config.to_dict())
        dot = f"{prefix}." if prefix else ""
        self.model = HrmTextBody(self.shape, SglangLayers(quant_config), f"{dot}model")
        if self.shape.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                self.shape.vocab_size, self.shape.hidden_size, quant_config=quant_config, prefix=f"{dot}lm_head"
            )
        self.logits_processor = LogitsProcessor(config)
        self.decoder = Decoder(self.model)
        self.prefiller = Prefiller(self.decoder)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_hidden_dim(self, module_name: str, layer_idx: int) -> tuple[int, int]:
        """Input and output size of a projection, for SGLang's pool of LoRA adapters.

        The pool has a place for each of `num_hidden_layers`, which counts KV slots; those behind the layers
        of the two stacks take no memory.
        """
        return sizes(self.shape, module_name) if layer_idx < 2 * self.shape.plan.layers_per_stack else (0, 0)

    def get_stacked_multiply(self, module_name: str) -> int:
        """Projections fused in one, for SGLang's pool of LoRA adapters."""
        return parts_of(module_name)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
    ) -> Any:
        final = None
        if input_embeds is None:
            final = self.prefiller.recur(input_ids, positions, forward_batch)
            if final is None:
                final = self.decoder.recur(input_ids, positions, forward_batch)
                if final is not None:
                    self.prefiller.capture()
        if final is None:
            scale = self.shape.embedding_scale
            z_H, z_L = self.model.begin(self.model.embed(input_ids) if input_embeds is None else input_embeds * scale)
            final, _ = self.model.recur(positions, z_H, z_L, forward_batch)
        return self.logits_processor(input_ids, final, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint; every parameter must be found in it.

        Raises:
            ValueError: a tensor has no parameter to go to, or a parameter no tensor.
        """
        parameters = dict(self.named_parameters())
        loaded = load_into(parameters, weights, default_weight_loader, self.shape.tie_word_embeddings)
        missing = sorted(parameters.keys() - loaded)
        if missing:
            raise ValueError(
                f"the checkpoint lacks {missing[0]!r} and {len(missing) - 1} more of HRM-Text's parameters"
            )
        return loaded
