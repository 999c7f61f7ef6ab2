"""Projections for 9 to 32 tokens, W dealt among clusters, against float64: on a GPU, and emulated on a CPU.

The emulation runs the kernel's own source, all CTAs of a cluster at once: what they send one another comes late, and
what they wait for is not there before.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hrm_text.config import HrmTextShape
from hrm_text.kernels import nvrtc
from hrm_text.kernels.clustered import (
    REGISTERS,
    TILES,
    TOKENS,
    Geometry,
    clustered_linear,
    code_for,
    tokens_for,
    why_not,
)
from hrm_text.kernels.staged import in_blocks
from hrm_text.plan import RecurrencePlan
from tests.kernels import projections
from tests.kernels.conftest import DEVICE
from tests.kernels.emulation import Emulated
from tests.kernels.projections import GENERATED, ON_GPU, PROJECTIONS, TOLERANCE, either, emulated, gpu
from tests.kernels.test_linear import error

KINDS = {name: projection[2:] for name, projection in PROJECTIONS.items()}
# Two clusters of two CTAs, 4 warps each, and of what a warp has to fetch a part while it multiplies.
SMALL = Geometry(128, 512, True, False, False, True, 16, splits=2, row_warps=2, k_warps=2, stages=2, shared=0)


class Case(projections.Case):
    def __init__(
        self, rows: int, width: int, norm: bool, swiglu: bool, residual: bool, tokens: int, seed: int = 0
    ) -> None:
        super().__init__(rows, width, norm, swiglu, residual, tokens, seed, clustered_linear)


def geometry_of(name: str, tokens: int) -> Geometry:
    """Of one of the 1B's projections."""
    return Geometry.of(*PROJECTIONS[name], name != "gqkv", tokens_for(tokens))


# ---- On a CPU


def small(name: str, tokens: int, seed: int = 0) -> tuple[Case, Geometry]:
    """A case of the kind that the 1B's projection is, and a geometry for it."""
    norm, swiglu, residual = KINDS[name]
    geometry = replace(SMALL, norm=norm, swiglu=swiglu, residual=residual, tokens=tokens_for(tokens))
    assert geometry.fits
    return Case(geometry.rows, geometry.width, *KINDS[name], tokens, seed), geometry


@emulated
@GENERATED
@given(
    clusters=st.integers(1, 2),
    splits=st.sampled_from([2, 4, 8]),
    share=st.integers(1, 3),
    k_warps=st.sampled_from([1, 2, 4]),
    blocks=st.integers(1, 7),
    stages=st.integers(2, 5),
    kind=st.sampled_from([(True, False, False), (False, False, True), (True, True, False), (False, True, False)]),
    blocked=st.booleans(),
    most=st.sampled_from(TOKENS),
    tokens=st.integers(1, 32),
    seed=st.integers(0, 1000),
)
def test_emulated_projections_equal_float64(
    clusters: int,
    splits: int,
    share: int,
    k_warps: int,
    blocks: int,
    stages: int,
    kind: tuple[bool, bool, bool],
    blocked: bool,
    most: int,
    tokens: int,
    seed: int,
) -> None:
    row_warps = splits * share if kind[1] else splits * share // 2  # with SwiGLU a CTA finishes tiles in pairs
    rows, width = 32 * row_warps * clusters, 32 * splits * k_warps * blocks
    geometry = Geometry(rows, width, *kind, blocked, most, splits, row_warps, k_warps, stages, shared=0)
    assume(tokens <= most and geometry.warps <= 16 and geometry.fits)
    case = Case(rows, width, *kind, tokens, seed)
    kernel = Emulated(geometry, seed)
    assert error(case.run(kernel, int(blocked)), case.expected()) <= TOLERANCE
    assert kernel.early_writes == 0


@emulated
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tokens", [9, 16, 17, 32])
def test_the_1b_on_an_h200_emulated(name: str, tokens: int) -> None:
    """Its very sizes."""
    case = Case(*PROJECTIONS[name], tokens, seed=tokens)
    kernel = Emulated(geometry_of(name, tokens))
    assert error(case.run(kernel, int(name != "gqkv")), case.expected()) <= TOLERANCE
    assert kernel.early_writes == 0


@emulated
@pytest.mark.parametrize("name", ["gqkv", "gate_up"])
def test_each_piece_is_fetched_once(name: str) -> None:
    """Of W by all CTAs together, of x by each cluster."""
    case, geometry = small(name, 9)
    kernel, x = Emulated(geometry), in_blocks(case.x)
    case.run_in_blocks(x, None, kernel, 1)
    address, size = kernel.fetched.T
    begin, end = case.weight.data_ptr(), case.weight.data_ptr() + case.weight.nbytes
    of_w = (begin <= address) & (address < end)
    assert np.array_equal(np.sort(address[of_w]), np.arange(begin, end, 16, dtype=np.uint64))
    assert (size[of_w] == 16).all()
    clusters = geometry.ctas // geometry.splits
    blocks = np.arange(x.data_ptr(), x.data_ptr() + x.nbytes, 9 * 64, dtype=np.uint64)
    assert np.array_equal(np.sort(address[~of_w]), np.repeat(blocks, clusters))
    assert (size[~of_w] == 9 * 64).all()


@either
@pytest.mark.parametrize(("tokens", "token"), [(9, 0), (9, 8), (32, 19)])
@pytest.mark.parametrize("name", ["gqkv", "gate_up", "down"])
def test_bad_numbers_come_through(name: str, tokens: int, token: int) -> None:
    """In all that the token's number is a part of, and nowhere else."""
    for bad in (float("nan"), float("inf")):
        case, kernel = Case(*PROJECTIONS[name], tokens, seed=1), None
        if not ON_GPU:
            case, geometry = small(name, tokens, seed=1)
            kernel = Emulated(geometry)
        case.x[token, 3] = bad
        finite = case.run(kernel, 1).isfinite()
        assert not finite[token].any()
        assert finite.sum() == (tokens - 1) * finite.shape[1]


BROKEN = {
    "the kernel before": ("  wait_for_last_kernel();\n", ""),
    "x": ("  wait(shared.x_there);\n", ""),
    "a stage's rows": ("    wait_for_groups<STAGES - 1>();\n", ""),
    "one stage more": ("wait_for_groups<STAGES - 1>()", "wait_for_groups<STAGES>()"),
    "all that read": ("  wait(shared.all_read);\n", ""),
    "all that is sent": ("  wait(shared.all_sent);\n", ""),
    "its own sums": ("  sync_all();  // its own\n", ""),
    "its own warps": ("  sync_all();\n  if (thread() < SPLITS)", "  if (thread() < SPLITS)"),
    "sums of its warps": ("  sync_all();\n#pragma unroll\n  for (int j", "#pragma unroll\n  for (int j"),
    "the cluster": ("  wait_for_cluster();\n", ""),
    "its barriers": ("    barriers_ready();\n", ""),
    "the bytes sent": (
        "    barrier_expect(shared.all_sent, SENT);\n",
        "    barrier_expect(shared.all_sent, SENT - 16);\n",
    ),
}


@emulated
@pytest.mark.parametrize("name", BROKEN)
def test_the_emulation_sees_what_is_not_waited_for(name: str) -> None:
    case, geometry = small("down", 9)
    edit = projections.replacing(*BROKEN[name])
    assert not projections.goes_wrong(case, (Emulated(geometry, seed) for seed in range(3)), copies=1)
    assert projections.goes_wrong(case, (Emulated(geometry, seed, edit) for seed in range(60)), copies=1)


# ---- Where it runs

MISFITS: dict[str, dict[str, Any]] = {
    "division": {"rows": 96},
    "shares": {"splits": 8, "width": 1024},
    "sums fit": {"row_warps": 4, "k_warps": 4, "tokens": 32, "splits": 4},
    "a lane for each": {"width": 2112 + 64},
}


@emulated
@pytest.mark.parametrize("reason", MISFITS)
def test_what_does_not_fit_is_known(reason: str) -> None:
    """Ahead of the compiler."""
    misfit = replace(SMALL, **MISFITS[reason])
    assert SMALL.fits and not misfit.fits
    with pytest.raises(AssertionError, match=reason):
        Emulated(misfit)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(*projection, name != "gqkv") for name, projection in PROJECTIONS.items()]
    device = torch.device(DEVICE)
    assert "float32" in str(why_not(shapes, torch.float32, device))
    assert ON_GPU or "Hopper" in str(why_not(shapes, torch.bfloat16, device))
    assert not ON_GPU or why_not(shapes, torch.bfloat16, device) is None
    monkeypatch.setattr(nvrtc, "capability", lambda device: 9)
    for rows, width, swiglu in ((96, 48, False), (160, 1536, False), (64, 1536, True)):
        reason = why_not([(rows, width, False, swiglu, not swiglu, True)], torch.bfloat16, device)
        assert f"({rows}, {width})" in str(reason)


@pytest.mark.parametrize("tokens", TOKENS)
def test_neighbours_fit_on_a_multiprocessor(tokens: int) -> None:
    """Shared memory, threads and registers of an H200. Two CTAs of gqkv or gate_up never share a multiprocessor, so
    none has two while others stand empty; each leaves room for one of the kernels around it."""
    tiles = {name: geometry_of(name, tokens) for name in TILES}
    for name, tile in tiles.items():
        assert tile.fits and tile.shared_bytes == TILES[name].shared * 1024
    for large in ("gqkv", "gate_up"):
        assert 2 * (tiles[large].shared_bytes + 1024) > 228 * 1024
        for other in ("o", "down"):
            both = tiles[large], tiles[other]
            assert sum(each.shared_bytes + 1024 for each in both) <= 228 * 1024
            assert sum(32 * each.warps for each in both) <= 2048
            assert sum(32 * each.warps * REGISTERS for each in both) <= 65536


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_compiles_for_hopper(name: str, tokens: int) -> None:
    projections.check_compiled(lambda: code_for(geometry_of(name, tokens)))


# ---- On a GPU


@gpu
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tokens", [9, 15, 16, 17, 24, 32])
def test_projections_equal_float64(name: str, tokens: int) -> None:
    for seed in range(4):
        case = Case(*PROJECTIONS[name], tokens, seed)
        assert error(case.run_in_poisoned_memory(copies=int(name != "gqkv")), case.expected()) <= TOLERANCE


@gpu
@pytest.mark.parametrize("tokens", [9, 16, 25, 32])
def test_a_chain_in_a_graph(tokens: int) -> None:
    chain = [Case(*PROJECTIONS[name], tokens, seed=1) for name in ("gqkv", "gate_up", "down")]
    wide = Case(1536, 6144, *KINDS["down"], tokens, seed=1)  # from gqkv to gate_up
    projections.check_chain_in_a_graph([chain[0], wide, *chain[1:]])


@gpu
@pytest.mark.parametrize("tokens", [9, 32])
def test_a_step_on_them_equals_one_on_triton(tokens: int) -> None:
    plan = RecurrencePlan(2, 1, 2)
    shape = HrmTextShape(plan, 1536, 4096, 12, 128, 16, 4096, 10000.0, 1e-6, 1.0, False, True)
    projections.check_step(shape, tokens, "why_not_clustered")
