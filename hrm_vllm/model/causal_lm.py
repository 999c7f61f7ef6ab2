"""`HrmTextForCausalLM` for vLLM: the shared forward, with TP, PP and LoRA."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix
from vllm.sequence import IntermediateTensors

from hrm_text.config import HrmTextShape, read_config
from hrm_text.model import HrmTextBody
from hrm_text.weights import PACKED_MODULES, load_into
from hrm_vllm.decode import Decoder
from hrm_vllm.model.layers import VllmLayers
from hrm_vllm.model.stacks import Passes
from hrm_vllm.prefill import Prefiller


class HrmTextModel(HrmTextBody):
    """The recurrence over this rank's steps."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        shape = read_config(vllm_config.model_config.hf_config.to_dict())
        group = get_pp_group()
        stage = shape.plan.stage(group.rank_in_group, group.world_size)
        super().__init__(shape, VllmLayers(vllm_config), prefix, stage)
        self._passes = Passes(self, vllm_config)
        self.compiled = self._passes.compiled

    def recur(
        self, positions: torch.Tensor, z_H: torch.Tensor, z_L: torch.Tensor, context: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for step in self.stage:
            if self.steps[step] == "L":
                z_L = self._passes(positions, z_L, z_H, step)
            else:
                z_H = self._passes(positions, z_H, z_L, step)
        return z_H, z_L

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if self.stage.start == 0:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed(input_ids)
            z_H, z_L = self.begin(inputs_embeds)
        else:
            assert intermediate_tensors is not None
            z_H, z_L = intermediate_tensors["z_H"], intermediate_tensors["z_L"]
        z_H, z_L = self.recur(positions, z_H, z_L)
        if self.stage.stop == len(self.steps):
            return z_H
        # An L step at the end of the last cycle aside, both states are needed downstream.
        return IntermediateTensors({"z_H": z_H, "z_L": z_L.contiguous()})


class HrmTextForCausalLM(nn.Module, SupportsLoRA, SupportsPP):
    """HRM-Text with its LM head; replaces vLLM's in-tree class of the same name."""

    packed_modules_mapping = PACKED_MODULES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.shape: HrmTextShape = read_config(self.config.to_dict())
        self.model = HrmTextModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.decoder = Decoder(self.model, vllm_config)
        self.prefiller = Prefiller(self.decoder, vllm_config)
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                self.shape.vocab_size,
                self.shape.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if self.shape.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(self.shape.vocab_size)

    @staticmethod
    def get_model_state_cls() -> type:
        """Model Runner V2 asks the model for the state that knows its spans."""
        from hrm_vllm.runner_v2 import HrmTextModelState

        return HrmTextModelState

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Zeroed (z_H, z_L), each (batch_size, hidden), for a later pipeline stage's dry runs."""
        size = (batch_size, self.shape.hidden_size)
        return IntermediateTensors({key: torch.zeros(size, dtype=dtype, device=device) for key in ("z_H", "z_L")})

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if input_ids is not None and intermediate_tensors is None and inputs_embeds is None:
            for kernels in (self.decoder, self.prefiller):
                z_H = kernels.recur(input_ids, positions)
                if z_H is not None:
                    return z_H
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint; every parameter of this rank must be found in it.

        Raises:
            ValueError: a tensor has no parameter to go to; vLLM refuses parameters left unloaded.
        """
        skip_lm_head = self.shape.tie_word_embeddings or isinstance(self.lm_head, PPMissingLayer)
        return load_into(dict(self.named_parameters()), weights, default_weight_loader, skip_lm_head)
