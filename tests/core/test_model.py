"""The forward pass over plain torch layers, against the oracle: no engine between them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hrm_text.config import HrmTextShape, read_config
from hrm_text.model import HrmTextBody
from hrm_text.oracle import reference_logprobs, span_mask
from hrm_text.spans import Spans
from hrm_text.weights import target_of

IDS = [6, 8, 97, 104, 111, 32, 200, 57, 7, 250, 88, 143]
SPANS = ((0, 9),)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class Rope(nn.Module):
    def __init__(self, shape: HrmTextShape) -> None:
        super().__init__()
        self.dim = shape.head_dim
        self.frequencies = shape.rope_theta ** -(torch.arange(0, self.dim, 2).float() / self.dim)

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = (positions[:, None].float() * self.frequencies)[:, None]
        left, right = x.view(len(x), -1, self.dim).chunk(2, dim=-1)
        turned = (left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin())
        return torch.cat(turned, dim=-1).view_as(x)

    def forward(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.turn(q, positions), self.turn(k, positions)


class SwiGLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class Attention(nn.Module):
    """Attention under the mask that comes as `context`."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.view(len(x), self.num_heads, -1).transpose(0, 1) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=context)
        return out.transpose(0, 1).flatten(1)


class TorchLayers:
    """`EngineLayers` of torch alone; notes the KV slot and the name of each attention layer."""

    def __init__(self, tp_size: int = 1) -> None:
        self.tp_size = tp_size
        self.attentions: list[tuple[int, str]] = []

    def column_linear(self, in_features: int, out_features: list[int], prefix: str) -> nn.Module:
        return Linear(in_features, sum(out_features), bias=False)

    def row_linear(self, in_features: int, out_features: int, prefix: str) -> nn.Module:
        return Linear(in_features, out_features, bias=False)

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        return nn.Embedding(vocab_size, hidden_size)

    def rms_norm(self, hidden_size: int, eps: float) -> nn.Module:
        return nn.RMSNorm(hidden_size, eps=eps, elementwise_affine=False)

    def rope(self, shape: HrmTextShape) -> nn.Module:
        return Rope(shape)

    def swiglu(self) -> nn.Module:
        return SwiGLU()

    def attention(self, num_heads: int, head_dim: int, slot: int, prefix: str) -> nn.Module:
        self.attentions.append((slot, prefix))
        return Attention(num_heads)


@pytest.fixture(scope="module")
def shape(reference: Any) -> HrmTextShape:
    return read_config(reference.config.to_dict())


@pytest.fixture(scope="module")
def on_disk(tiny: str) -> dict[str, torch.Tensor]:
    return load_file(Path(tiny, "model.safetensors"))


def load(body: HrmTextBody, tensors: dict[str, torch.Tensor]) -> None:
    """Every parameter of `body`, from checkpoint tensors under either naming."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, shard = target_of(name)
        parts.setdefault(parameter, {})[shard or 0] = tensor
    whole = {name: torch.cat([shards[i] for i in sorted(shards)]) for name, shards in parts.items()}
    del whole["lm_head.weight"]
    body.load_state_dict({name.removeprefix("model."): tensor for name, tensor in whole.items()}, strict=True)


@torch.inference_mode()
def logprobs(stages: list[HrmTextBody], head: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Log-probs after the pipeline `stages`, each of which gets no more than (z_H, z_L)."""
    positions = torch.arange(len(IDS))
    z_H, z_L = stages[0].begin(stages[0].embed(torch.tensor(IDS)))
    for stage in stages:
        z_H, z_L = stage.recur(positions, z_H, z_L, span_mask(spans, len(IDS)))
    return torch.log_softmax(z_H @ head.T, dim=-1)


@pytest.mark.parametrize("spans", [SPANS, (), ((0, 4), (5, 9)), ((0, len(IDS)),)], ids=str)
@pytest.mark.parametrize("naming", ["on disk", "runtime"])
def test_the_forward_pass_is_the_oracles(
    spans: Spans, naming: str, shape: HrmTextShape, on_disk: dict[str, torch.Tensor], reference: Any
) -> None:
    tensors = on_disk if naming == "on disk" else reference.state_dict()
    body = HrmTextBody(shape, TorchLayers(), "model")
    load(body, tensors)

    ours = logprobs([body], on_disk["lm_head.weight"], spans)

    torch.testing.assert_close(ours, reference_logprobs(reference, IDS, spans), rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_pipeline_stages_add_up_to_the_whole(
    world_size: int, shape: HrmTextShape, on_disk: dict[str, torch.Tensor], reference: Any
) -> None:
    engines = [TorchLayers() for _ in range(world_size)]
    stages = [
        HrmTextBody(shape, engine, "model", shape.plan.stage(rank, world_size)) for rank, engine in enumerate(engines)
    ]
    for stage in stages:
        load(stage, on_disk)

    ours = logprobs(stages, on_disk["lm_head.weight"], SPANS)

    torch.testing.assert_close(ours, reference_logprobs(reference, IDS, SPANS), rtol=0, atol=1e-5)
    slots = [slot for engine in engines for slot, _ in engine.attentions]
    assert sorted(slots) == list(range(shape.plan.num_slots))


def test_an_attention_layers_name_holds_its_slot_and_no_other_number(shape: HrmTextShape) -> None:
    engine = TorchLayers()
    HrmTextBody(shape, engine, "model")

    assert sorted(slot for slot, _ in engine.attentions) == list(range(shape.plan.num_slots))
    for slot, name in engine.attentions:
        stack = shape.plan.steps[slot // shape.plan.layers_per_stack]
        assert name == f"model.{stack}_module.layers.{slot}.self_attn.attn"


def test_heads_that_cannot_be_split_are_refused_by_name(shape: HrmTextShape) -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3 does not divide num_attention_heads=2"):
        HrmTextBody(shape, TorchLayers(tp_size=3), "model")
