"""A whole decode step on the fused kernels against the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hrm_text.config import read_config
from hrm_text.kernels import attention_many, decode
from hrm_text.kernels.attention import DecodeBatch
from hrm_text.kernels.decode import FusedDecode, why_not
from hrm_text.kernels.streamed import streamed_linear
from hrm_text.model import HrmTextBody
from hrm_text.oracle import token_logprobs
from hrm_text.plain import PlainLayers, rope_table
from hrm_text.weights import load_into
from tests.kernels.conftest import DEVICE

LENGTH = 3


def copy(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    parameter.copy_(tensor)


@pytest.fixture(scope="module")
def body(tiny: str, reference: Any) -> HrmTextBody:
    shape = read_config(reference.config.to_dict())
    built = HrmTextBody(shape, PlainLayers(), "model")
    holder = torch.nn.Module()
    holder.model = built
    holder.lm_head = torch.nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
    holder.requires_grad_(False)
    weights = load_file(next(Path(tiny).glob("*.safetensors")))
    load_into(dict(holder.named_parameters()), weights.items(), copy, False)
    built.lm_head = holder.lm_head
    return built.to(DEVICE)


@pytest.mark.parametrize(("rows", "tiled"), [(1, False), (2, False), (17, True), (17, False)])
def test_tokens_one_by_one_equal_the_oracle(
    body: HrmTextBody, reference: Any, rows: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of the batch decodes its own causal prompt from an empty cache, all kernels and paths in play."""
    assert why_not(body, torch.float32) is None
    monkeypatch.setattr(decode, "MAX_TILED_TOKENS", 128 if tiled else 16)
    monkeypatch.setattr(attention_many, "EXTRA_PROGRAMS", 1)  # the interpreter takes them one by one
    shape = body.shape
    generator = torch.Generator().manual_seed(rows)
    prompts = torch.randint(12, shape.vocab_size, (rows, LENGTH), generator=generator)
    table = (torch.arange(rows * LENGTH, dtype=torch.int32).view(rows, LENGTH) + 1).to(DEVICE)
    cache = torch.zeros(shape.plan.num_slots, 2, rows * LENGTH + 1, 1, shape.num_heads, shape.head_dim, device=DEVICE)
    fused = FusedDecode(body, torch.device(DEVICE))
    logprobs = []
    for position in range(LENGTH - 1):
        batch = DecodeBatch(
            positions=torch.full((rows,), position, device=DEVICE),
            write_slots=table[:, position].long(),
            table=table,
            row_starts=None,
            lengths=torch.full((rows,), position + 1, dtype=torch.int32, device=DEVICE),
            page_size=1,
            cos_sin=rope_table(shape).to(DEVICE),
        )
        z_H = fused(prompts[:, position].to(DEVICE), batch, lambda slot: (cache[slot, 0], cache[slot, 1]))
        logprobs.append(body.lm_head(z_H).float().log_softmax(-1).cpu())
    for row in range(min(rows, 2)):
        expected = token_logprobs(reference, prompts[row].tolist(), ())
        got = torch.stack([logprobs[at][row, prompts[row, at + 1]] for at in range(LENGTH - 1)])
        assert float((got - expected).abs().max()) <= 1e-5


def test_what_runs_the_projections_of_how_many_tokens(body: HrmTextBody) -> None:
    fused, sizes = FusedDecode(body, torch.device(DEVICE)), (1, 8, 9, 16, 17, 128, 129)
    for no_staged, no_streamed, tiled in (
        (None, None, [None, None, *[streamed_linear] * 4, None]),
        (None, "compared with", [None, None, None, None, fused.project, fused.project, None]),
        ("compared with", "compared with", [None, None, None, None, fused.project, fused.project, None]),
    ):
        fused.why_not_staged, fused.why_not_streamed = no_staged, no_streamed
        assert [fused.staged(size) for size in sizes] == [size <= 8 and not no_staged for size in sizes]
        assert [fused.tiled(size) for size in sizes] == tiled


def test_other_weights_are_refused(body: HrmTextBody) -> None:
    """Quantised, sharded, of another dtype, wrapped for LoRA; and a pipeline stage."""
    attention = body.H_module.layers[0].self_attn
    projection, weight = attention.o_proj, attention.o_proj.weight
    half = weight[:, : weight.shape[1] // 2].contiguous()
    for other in (weight.to(torch.float8_e4m3fn), half, weight.bfloat16()):
        projection.weight = torch.nn.Parameter(other, requires_grad=False)
        assert "o_proj" in str(why_not(body, torch.float32))
    projection.weight = weight
    wrapper = torch.nn.Module()
    wrapper.base_layer, wrapper.weight = projection, weight
    attention.o_proj = wrapper
    assert "LoRA" in str(why_not(body, torch.float32))
    attention.o_proj = projection
    embedding = body.embed_tokens.weight
    body.embed_tokens.weight = torch.nn.Parameter(embedding.bfloat16(), requires_grad=False)
    assert "embed_tokens" in str(why_not(body, torch.float32))
    body.embed_tokens.weight = embedding
    assert "float16" in str(why_not(body, torch.float16))
    body.stage = range(4)
    assert why_not(body, torch.float32) == "pipeline parallelism"
    body.stage = range(len(body.steps))
    assert why_not(body, torch.float32) is None
