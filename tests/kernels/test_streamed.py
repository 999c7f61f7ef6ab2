"""Projections for 9 to 128 tokens, W and x streaming by, against float64: on a GPU, and emulated on a CPU.

The emulation runs the kernel's own source, all CTAs of a cluster at once: tiles come late and in any order, products
read them as late as a wait allows, and what is sent comes when it comes.
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
from hrm_text.kernels.streamed import (
    LEAST_REGISTERS,
    MAX_PARTS,
    TILES,
    TOKENS,
    Geometry,
    Tile,
    code_for,
    streamed_linear,
    why_not,
)
from hrm_text.plan import RecurrencePlan
from tests.kernels import projections
from tests.kernels.conftest import DEVICE
from tests.kernels.emulation import Emulated
from tests.kernels.projections import GENERATED, ON_GPU, PROJECTIONS, TOLERANCE, either, emulated, gpu
from tests.kernels.test_linear import EPS, error

KINDS = {name: projection[2:] for name, projection in PROJECTIONS.items()}
# Two clusters of two CTAs, of whose rings both come by more than once.
SMALL = Geometry(96, 512, False, False, True, 32, Tile(48, 2, 2, 0), w_stages=2, x_stages=3)


class Case(projections.Case):
    """The squares of x are in `parts`, as kernels leave them."""

    parts = 3
    left: torch.Tensor | None = None

    def run(self, kernel: Any = None) -> torch.Tensor:
        squares = None
        if self.norm:
            share = torch.rand(len(self.x), self.parts, device=DEVICE)
            squares = self.x.float().square().sum(1, keepdim=True) * (share / share.sum(1, keepdim=True))
        out, self.left = streamed_linear(
            self.x, self.weight, squares=squares, eps=EPS, swiglu=self.swiglu, residual=self.residual, kernel=kernel
        )
        return out

    def check(self, out: torch.Tensor) -> None:
        """What was computed, and the squares that it left."""
        assert error(out, self.expected()) <= TOLERANCE
        assert (self.left is None) == (self.residual is None)
        if self.left is not None:
            torch.testing.assert_close(self.left.sum(1), out.float().square().sum(1))


def group_of(tokens: int) -> int:
    """The kernel's, of `TOKENS`."""
    return next(each for each in TOKENS if tokens <= each)


# ---- On a CPU


def small(name: str, tokens: int, seed: int = 0) -> tuple[Case, Geometry]:
    """A case of the kind that the 1B's projection is, and a geometry for it."""
    norm, swiglu, residual = KINDS[name]
    tile = Tile(64 if swiglu else 48, 2, 2, 0)
    geometry = replace(
        SMALL, rows=2 * tile.rows, norm=norm, swiglu=swiglu, residual=residual, tile=tile, tokens=group_of(tokens)
    )
    assert geometry.fits
    return Case(geometry.rows, geometry.width, *KINDS[name], tokens, seed), geometry


@emulated
@GENERATED
@given(
    clusters=st.integers(1, 3),
    splits=st.sampled_from([1, 2, 4]),
    steps=st.integers(1, 6),
    w_stages=st.integers(2, 5),
    x_stages=st.integers(2, 5),
    kind=st.sampled_from([(True, False, False), (False, False, True), (True, True, False), (False, True, False)]),
    parts=st.sampled_from([1, 3, 24, MAX_PARTS]),
    group=st.sampled_from(TOKENS),
    tokens=st.integers(1, 128),
    seed=st.integers(0, 1000),
)
def test_emulated_projections_equal_float64(
    clusters: int,
    splits: int,
    steps: int,
    w_stages: int,
    x_stages: int,
    kind: tuple[bool, bool, bool],
    parts: int,
    group: int,
    tokens: int,
    seed: int,
) -> None:
    assume(tokens <= group)
    tile = Tile(64 if kind[1] else 48, splits, x_stages, 0)
    rows, width = tile.rows * clusters, 64 * splits * steps
    stages = [min(steps, max(2, each)) for each in (w_stages, x_stages)]
    geometry = Geometry(rows, width, *kind, group, tile, *stages)
    assert geometry.fits
    case = Case(rows, width, *kind, tokens, seed)
    case.parts = parts
    kernel = Emulated(geometry, seed)
    case.check(case.run(kernel))
    assert kernel.early_writes == 0


@emulated
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tokens", [9, 64, 65])
def test_the_1b_on_an_h200_emulated(name: str, tokens: int) -> None:
    """Its very sizes."""
    case = Case(*PROJECTIONS[name], tokens, seed=tokens)
    kernel = Emulated(Geometry.of(*PROJECTIONS[name], group_of(tokens)))
    case.check(case.run(kernel))
    assert kernel.early_writes == 0


@emulated
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_each_piece_is_fetched_once(name: str) -> None:
    """Of W by all CTAs together, of x by each cluster."""
    case, geometry = small(name, 9)
    kernel = Emulated(geometry)
    case.run(kernel)
    address, size = kernel.fetched.T
    assert (size == 128).all()
    for matrix, times in ((case.weight, 1), (case.x, 2)):
        lines = np.arange(matrix.data_ptr(), matrix.data_ptr() + matrix.nbytes, 128, dtype=np.uint64)
        among = (lines[0] <= address) & (address <= lines[-1])
        assert np.array_equal(np.sort(address[among]), np.repeat(lines, times))


@either
@pytest.mark.parametrize(("tokens", "token"), [(9, 0), (9, 8), (70, 19), (70, 69)])
@pytest.mark.parametrize("name", ["gqkv", "gate_up", "down"])
def test_bad_numbers_come_through(name: str, tokens: int, token: int) -> None:
    """In all that the token's number is a part of, and nowhere else."""
    for bad in (float("nan"), float("inf")):
        case, kernel = Case(*PROJECTIONS[name], tokens, seed=1), None
        if not ON_GPU:
            case, geometry = small(name, tokens, seed=1)
            kernel = Emulated(geometry)
        case.x[token, 3] = bad
        finite = case.run(kernel).isfinite()
        assert not finite[token].any()
        assert finite.sum() == (tokens - 1) * finite.shape[1]
        if case.left is not None:
            there = case.left.isfinite()
            assert not there[token].any() and there.sum() == (tokens - 1) * there.shape[1]


BROKEN = {
    "the kernel before": ("  wait_for_last_kernel();\n", ""),
    "a tile of x": ("    wait(&shared.x_there[x_stage], step / X_STAGES & 1);\n", ""),
    "a tile of W": ("    wait(&shared.w_there[w_stage], step / W_STAGES & 1);\n", ""),
    "room for x": ("    wait(&shared.x_read[turn.stage], turn.parity);\n", ""),
    "room for W": ("    wait(&shared.w_read[turn.stage], turn.parity);\n", ""),
    "any product": (
        "    wait_for_products<1>();\n    if (step > 0) release(shared, step - 1);\n",
        "    release(shared, step);\n",
    ),
    "one product more": ("    if (step > 0) release(shared, step - 1);\n", "    release(shared, step);\n"),
    "the last products": ("  wait_for_products<0>();\n", ""),
    "all that is sent": ("  wait(&shared.sent[warp()]);\n", ""),
    "the cluster": ("  wait_for_cluster();\n", ""),
    "its barriers": ("  barriers_ready();\n", ""),
    "the bytes sent": ("SPLITS * SENT * 16", "SPLITS * SENT * 16 - 16"),
}


@emulated
@pytest.mark.parametrize("name", BROKEN)
def test_the_emulation_sees_what_is_not_waited_for(name: str) -> None:
    case, geometry = small("down", 9)
    edit = projections.replacing(*BROKEN[name])
    assert not projections.goes_wrong(case, (Emulated(geometry, seed) for seed in range(3)))
    assert projections.goes_wrong(case, (Emulated(geometry, seed, edit) for seed in range(60)))


# ---- Where it runs

MISFITS: dict[str, dict[str, Any]] = {
    "division": {"rows": 100},
    "stages": {"x_stages": 5},
    "a stage is given back": {"w_stages": 1},
    "threads": {"tile": Tile(48, 8, 2, 0)},
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
    shapes, device = list(PROJECTIONS.values()), torch.device(DEVICE)
    assert "float32" in str(why_not(shapes, torch.float32, device))
    if not ON_GPU:
        assert "Hopper" in str(why_not(shapes, torch.bfloat16, device))
    assert not ON_GPU or why_not(shapes, torch.bfloat16, device) is None
    monkeypatch.setattr(nvrtc, "capability", lambda device: 9)
    for rows, width, swiglu in ((96, 48, False), (160, 1536, False), (96, 1536, True), (3072, 1536, False)):
        reason = why_not([(rows, width, False, swiglu, not swiglu)], torch.bfloat16, device)
        assert f"({rows}, {width})" in str(reason)


@pytest.mark.parametrize("tokens", TOKENS)
def test_kernels_fit_on_a_multiprocessor(tokens: int) -> None:
    """Of an H200, on which each has a CTA for nearly every multiprocessor; o's and down's leave room for another."""
    for name in TILES[tokens]:
        geometry = Geometry.of(*PROJECTIONS[name], tokens)
        assert geometry.fits and geometry.shared_bytes == TILES[tokens][name].shared * 1024
        assert geometry.ctas == 128 and geometry.w_stages >= 4
        # A second CTA has no room while one is launched, with the least registers that they take (hopper.py).
        assert 32 * geometry.launched_warps * geometry.registers <= 65536
        assert geometry.launched_warps == (20 if name in ("o", "down") else geometry.warps)
        assert name not in ("o", "down") or 2 * 32 * geometry.launched_warps * LEAST_REGISTERS > 65536
        assert name not in ("o", "down") or 2 * (geometry.shared_bytes + 1024) <= 228 * 1024


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_compiles_for_hopper(name: str, tokens: int) -> None:
    projections.check_compiled(lambda: code_for(Geometry.of(*PROJECTIONS[name], tokens)))


# ---- On a GPU


@gpu
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tokens", [9, 16, 31, 32, 33, 63, 64, 65, 100, 128])
def test_projections_equal_float64(name: str, tokens: int) -> None:
    for seed in range(4):
        case = Case(*PROJECTIONS[name], tokens, seed)
        case.parts = (1, 32)[seed % 2]
        case.check(case.run_in_poisoned_memory())


@gpu
@pytest.mark.parametrize("tokens", [9, 32, 48, 64, 128])
def test_a_chain_in_a_graph(tokens: int) -> None:
    """Each kernel starts before its input is there: what they write holds NaN until then. Replays agree to the bit."""
    o, gate_up, down, gqkv = (Case(*PROJECTIONS[name], tokens, seed=1) for name in ("o", "gate_up", "down", "gqkv"))
    x, given = o.x, o.x.clone()

    def run() -> list[torch.Tensor]:
        written = [x]
        for _ in range(6):
            y, squares = streamed_linear(written[-1], o.weight, residual=written[-1])
            act, _ = streamed_linear(y, gate_up.weight, squares=squares, eps=EPS, swiglu=True)
            z, more = streamed_linear(act, down.weight, residual=y)
            wide, _ = streamed_linear(z, gqkv.weight, squares=more, eps=EPS)
            assert squares is not None and more is not None
            written += [squares, y, act, more, wide, wide[:, :1536].contiguous()]
        return written

    first = [each.clone() for each in run()]
    o.residual = o.x = first[0]
    gate_up.x = first[2]
    assert error(first[2], o.expected()) <= TOLERANCE and error(first[3], gate_up.expected()) <= TOLERANCE
    projections.check_replays(run, first, 300, lambda: x.copy_(given))


@gpu
@pytest.mark.parametrize("tokens", [9, 32, 64, 128])
def test_a_step_on_them_equals_one_on_triton(tokens: int) -> None:
    plan = RecurrencePlan(2, 1, 2)
    shape = HrmTextShape(plan, 1536, 4096, 12, 128, 16, 4096, 10000.0, 1e-6, 1.0, False, True)
    projections.check_step(shape, tokens, "why_not_streamed")
