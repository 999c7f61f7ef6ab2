"""What a decode step begins with, against the model's own functions: to the bit where both round at the same places."""

import pytest
import torch

from hrm_text.config import HrmTextShape
from hrm_text.kernels.first import first
from hrm_text.kernels.staged import in_blocks, room_for
from hrm_text.model import HrmTextBody
from hrm_text.plain import PlainLayers
from hrm_text.plan import RecurrencePlan
from tests.kernels.conftest import DEVICE

VOCABULARY = 97
# The interpreter cuts numbers off where a GPU rounds them to bfloat16.
DTYPES = [torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float32]


def body_of(hidden: int, dtype: torch.dtype, scale: float = 39.191835884530846) -> HrmTextBody:
    shape = HrmTextShape(RecurrencePlan(1, 1, 1), hidden, 64, 2, 32, VOCABULARY, 64, 10000.0, 1e-6, scale, False, True)
    body = HrmTextBody(shape, PlainLayers(), "model").to(DEVICE, dtype)
    torch.manual_seed(hidden)
    body.embed_tokens.weight.data.normal_(0, 0.05)
    body.z_L_init.data.normal_()
    return body


@pytest.mark.parametrize("hidden", [64, 96, 1536])
@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 65, 129])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("blocks", "squares"), [(True, False), (False, True), (False, False)])
def test_it_equals_the_model(hidden: int, tokens: int, dtype: torch.dtype, blocks: bool, squares: bool) -> None:
    body = body_of(hidden, dtype)
    kind = (torch.int32, torch.int64)[tokens % 2]
    ids = torch.randint(VOCABULARY, (tokens, 2), dtype=kind, device=DEVICE)[:, 0]
    z_H, z_L = body.begin(body.embed(ids))
    expected = z_L + z_H
    poison = [
        torch.full_like(z_H, float("nan")),
        torch.full_like(room_for(int(blocks), tokens, hidden, z_H), float("nan")),
    ]
    del poison  # whose memory the results take
    got, x, left = first(body, ids, blocks, squares)
    assert torch.equal(got, z_H)
    # In float32 the compiler makes one instruction of the product and the sum, and one rounding.
    tolerance = 0.0 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(x, in_blocks(expected) if blocks else expected, rtol=tolerance, atol=tolerance)
    assert (left is not None) == squares
    if left is not None:
        torch.testing.assert_close(left, expected.float().square().sum(-1, keepdim=True))


def test_bad_numbers_come_through() -> None:
    body = body_of(64, DTYPES[0])
    body.embed_tokens.weight.data[5, 3] = float("nan")
    body.embed_tokens.weight.data[6, 4] = float("inf")
    z_H, x, left = first(body, torch.tensor([4, 5, 6], device=DEVICE), False, True)
    assert left is not None
    for each in (z_H, x, left):
        assert each.isfinite().all(1).tolist() == [True, False, False]


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_replays_agree() -> None:
    """Behind a kernel that writes the ids, which it must wait for."""
    body, ids = body_of(1536, torch.bfloat16), torch.arange(64, device=DEVICE)
    graph, there = torch.cuda.CUDAGraph(), torch.empty_like(ids)
    there.copy_(ids)
    first(body, there, False, True)
    with torch.cuda.graph(graph):
        there.copy_(ids)
        got = first(body, there, False, True)
    expected = [each.clone() for each in first(body, ids, False, True) if each is not None]
    for _ in range(100):
        there.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True) if a is not None)
