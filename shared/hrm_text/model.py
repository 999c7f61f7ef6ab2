"""HRM-Text's forward pass, written once over the layers that an engine supplies.

Follows `transformers.models.hrm_text.modeling_hrm_text` (arXiv 2605.20613): pre-norm blocks with a
parameterless RMSNorm, MHA with RoPE and a per-head sigmoid gate before `o_proj`, SwiGLU, and one
parameterless RMSNorm at the end of each stack (MagicNorm). Activations are (tokens, hidden); what
differs between tokens of a batch (KV slots, spans) is the engine's attention layer's business.
"""

from typing import Any, Protocol

import torch
from torch import nn

from hrm_text.config import HrmTextShape
from hrm_text.plan import Stack


class EngineLayers(Protocol):
    """The layers that an engine's adapter builds.

    Linear layers return (output, bias) like vLLM's and SGLang's; `context` is whatever the engine's
    attention needs beside q, k and v (SGLang's ForwardBatch; None for vLLM).
    """

    tp_size: int

    def column_linear(self, in_features: int, out_features: list[int], prefix: str) -> nn.Module:
        """Fused projections with their outputs split over tensor-parallel ranks."""

    def row_linear(self, in_features: int, out_features: int, prefix: str) -> nn.Module:
        """A projection with its input split over tensor-parallel ranks, summed."""

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        """Token embedding."""

    def rms_norm(self, hidden_size: int, eps: float) -> nn.Module:
        """RMSNorm without a weight."""

    def rope(self, shape: HrmTextShape) -> nn.Module:
        """`rope(positions, q, k) -> (q, k)`, neox style over the whole head."""

    def swiglu(self) -> nn.Module:
        """`silu(gate) * up` of a fused [gate | up]."""

    def attention(self, num_heads: int, head_dim: int, slot: int, prefix: str) -> nn.Module:
        """PrefixLM attention over KV slot `slot`; `attn(q, k, v, context)`, all (tokens, heads * head_dim)."""


class Attention(nn.Module):
    """Gated MHA of one block, with a KV slot for each step that runs it."""

    def __init__(self, shape: HrmTextShape, engine: EngineLayers, steps: list[int], layer: int, prefix: str) -> None:
        super().__init__()
        if shape.num_heads % engine.tp_size:
            raise ValueError(
                f"tensor_parallel_size={engine.tp_size} does not divide num_attention_heads={shape.num_heads}"
            )
        width = shape.num_heads * shape.head_dim
        heads = shape.num_heads // engine.tp_size
        self.gqkv_proj = engine.column_linear(shape.hidden_size, [width] * 4, f"{prefix}.gqkv_proj")
        self.o_proj = engine.row_linear(width, shape.hidden_size, f"{prefix}.o_proj")
        self.rotary_emb = engine.rope(shape)
        slots = {step: shape.plan.slot(step, layer) for step in steps}
        # Engines read a layer's KV slot from the number in its name.
        self.attn = nn.ModuleDict(
            {
                str(step): engine.attention(
                    heads, shape.head_dim, slot, prefix.replace(f"layers.{layer}.", f"layers.{slot}.") + ".attn"
                )
                for step, slot in slots.items()
            }
        )

    def forward(self, positions: torch.Tensor, x: torch.Tensor, step: int, context: Any) -> torch.Tensor:
        gqkv, _ = self.gqkv_proj(x)
        gate, q, k, v = gqkv.chunk(4, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        out = self.attn[str(step)](q, k, v, context)
        out, _ = self.o_proj(torch.sigmoid(gate) * out)
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: HrmTextShape, engine: EngineLayers, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = engine.column_linear(
            shape.hidden_size, [shape.intermediate_size] * 2, f"{prefix}.gate_up_proj"
        )
        self.down_proj = engine.row_linear(shape.intermediate_size, shape.hidden_size, f"{prefix}.down_proj")
        self.act = engine.swiglu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act(gate_up))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: HrmTextShape, engine: EngineLayers, steps: list[int], layer: int, prefix: str) -> None:
        super().__init__()
        self.self_attn = Attention(shape, engine, steps, layer, f"{prefix}.self_attn")
        self.mlp = MLP(shape, engine, f"{prefix}.mlp")
        self.input_layernorm = engine.rms_norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = engine.rms_norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, positions: torch.Tensor, x: torch.Tensor, step: int, context: Any) -> torch.Tensor:
        x = x + self.self_attn(positions, self.input_layernorm(x), step, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class StackModule(nn.Module):
    """One transformer stack; a call at another step uses the same weights and other KV slots."""

    def __init__(self, shape: HrmTextShape, engine: EngineLayers, steps: list[int], prefix: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(shape, engine, steps, layer, f"{prefix}.layers.{layer}")
            for layer in range(shape.plan.layers_per_stack)
        )
        self.final_norm = engine.rms_norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, positions: torch.Tensor, x: torch.Tensor, step: int, context: Any) -> torch.Tensor:
        for layer in self.layers:
            x = layer(positions, x, step, context)
        return self.final_norm(x)


class HrmTextBody(nn.Module):
    """Embedding and recurrence of the steps in `stage`.

    A pipeline stage holds the weights of both stacks, the KV slots of its own steps, and hands
    (z_H, z_L) on.
    """

    def __init__(self, shape: HrmTextShape, engine: EngineLayers, prefix: str, stage: range | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.steps = shape.plan.steps
        self.stage = range(len(self.steps)) if stage is None else stage
        self.embed_tokens = engine.embedding(shape.vocab_size, shape.hidden_size, f"{prefix}.embed_tokens")
        self.L_module = StackModule(shape, engine, self._own("L"), f"{prefix}.L_module")
        self.H_module = StackModule(shape, engine, self._own("H"), f"{prefix}.H_module")
        self.z_L_init = nn.Parameter(torch.zeros(shape.hidden_size), requires_grad=False)

    def _own(self, stack: Stack) -> list[int]:
        return [step for step in self.shape.plan.steps_of(stack) if step in self.stage]

    def attention_layers(self) -> dict[int, Any]:
        """The engine's attention layer of each KV slot of this stage."""
        return {
            self.shape.plan.slot(int(step), index): paged.attn
            for stack in (self.L_module, self.H_module)
            for index, block in enumerate(stack.layers)
            for step, paged in block.self_attn.attn.items()
        }

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Scaled token embeddings, (tokens, hidden)."""
        return self.embed_tokens(input_ids) * self.shape.embedding_scale

    def begin(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(z_H, z_L) before the first step."""
        return embeddings, self.z_L_init.to(embeddings.dtype).expand_as(embeddings)

    def recur(
        self, positions: torch.Tensor, z_H: torch.Tensor, z_L: torch.Tensor, context: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run this stage's steps; (z_H, z_L) after them. The last stage's z_H feeds the LM head."""
        for step in self.stage:
            if self.steps[step] == "L":
                z_L = self.L_module(positions, z_L + z_H, step, context)
            else:
                z_H = self.H_module(positions, z_H + z_L, step, context)
        return z_H, z_L
