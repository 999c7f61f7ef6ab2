"""Projections whose weights wait in shared memory against float64: on a GPU, and emulated on a CPU.

The emulation runs the kernel's own source, a fiber for each CUDA thread, copies and the end of the kernel before late
and in random order. So what it shows of the ring and of what is waited for does not hang on a model of them.
"""

from math import ceil

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hrm_text.config import HrmTextShape
from hrm_text.kernels import staged
from hrm_text.kernels.attention import REGISTERS
from hrm_text.kernels.staged import (
    COPIES,
    Geometry,
    code_for,
    fits,
    in_blocks,
    in_rows,
    slot_bytes,
    why_not,
)
from hrm_text.plan import RecurrencePlan
from tests.kernels import projections
from tests.kernels.conftest import DEVICE
from tests.kernels.emulation import Edit, Emulated
from tests.kernels.projections import GENERATED, ON_GPU, TOLERANCE, Case, either, emulated, gpu
from tests.kernels.test_linear import error

PROJECTIONS = projections.PROJECTIONS | {
    "narrow": (1536, 6144, False, False, True),  # a ring of one slot
    "other": (676, 896, True, True, False),  # a quad for some CTAs and two for others, slices for 4 warps
}


# ---- On a CPU


def emulation(case: Case, seed: int = 0, edit: Edit = lambda text: text, **sizes: int) -> Emulated:
    rows, width = case.weight.shape
    chosen = {"ctas": 3, "warps": 4, "slots": 3, "registers": 64, "ahead": 2} | sizes
    return Emulated(Geometry(rows, width, case.norm, case.swiglu, case.residual is not None, **chosen), seed, edit)


@emulated
@GENERATED
@given(
    width=st.sampled_from([128, 256, 384]),
    quads=st.integers(3, 17),
    kind=st.sampled_from([(True, False, False), (False, False, True), (True, True, False), (False, True, False)]),
    tokens=st.integers(1, 8),
    ctas=st.integers(1, 3),
    slots=st.integers(1, 7),
    ahead=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_emulated_projections_equal_float64(
    width: int, quads: int, kind: tuple[bool, bool, bool], tokens: int, ctas: int, slots: int, ahead: int, seed: int
) -> None:
    quads = max(8, quads // 8 * 8) if kind[2] else quads  # whole blocks of the residual
    case = Case(4 * quads, width, *kind, tokens, seed)
    tile, warps = min(4, slots), 4
    sums = 4 * warps * 8 * (4 * tile + (0 if tile % 2 else 4)) * ceil(ceil(quads / ctas) / tile)
    assume(sums <= slots * slot_bytes(width))  # which take the ring's place
    kernel = emulation(case, seed, ctas=ctas, slots=slots, warps=warps, ahead=ahead)
    assert error(case.run(kernel), case.expected()) <= TOLERANCE
    assert kernel.early_writes == 0


@emulated
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tokens", [1, 8])
def test_the_1b_on_an_h200_emulated(name: str, tokens: int) -> None:
    """Its very sizes."""
    case = Case(*PROJECTIONS[name], tokens, seed=tokens)
    kernel = Emulated(Geometry.of(*PROJECTIONS[name], 132))
    assert error(case.run(kernel), case.expected()) <= TOLERANCE


@either
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("name", ["o", "gate_up"])
def test_copies(name: str, tokens: int) -> None:
    """CTAs read those of x in turn, each its own, and write all of y; of the residual's the first is read."""
    kind = PROJECTIONS[name][2:]
    rows, ctas = (1088, torch.cuda.get_device_properties(0).multi_processor_count) if ON_GPU else (128, 6)
    cases = [Case(rows, 256, *kind, tokens, seed=seed) for seed in range(COPIES)]
    for case in cases[1:]:
        case.weight, case.residual = cases[0].weight, cases[0].residual
    every = [case.expected() for case in cases]
    quads, outputs = rows // 4, every[0].shape[1]
    owner = torch.empty(outputs, dtype=torch.long)
    for cta in range(ctas):
        first, end = (outputs * (quads * each // ctas) // quads for each in (cta, cta + 1))
        owner[first:end] = cta % COPIES
    mixed = torch.empty_like(every[0])
    for i, each in enumerate(every):
        mixed[:, owner == i] = each[:, owner == i]
    x, residual = torch.cat([in_blocks(case.x) for case in cases]), cases[0].residual
    if residual is not None:
        residual = torch.cat([in_blocks(residual), in_blocks(residual * float("nan"))])
    for copies in (1, COPIES):
        kernel = None if ON_GPU else emulation(cases[0], ctas=ctas, slots=8, copies=copies)
        got = cases[0].run_in_blocks(x, residual, kernel, copies)
        assert got.shape == (copies, outputs // 32, tokens, 32)
        for each in got:
            assert error(in_rows(each[None]), mixed) <= TOLERANCE


@emulated
def test_each_row_is_fetched_once() -> None:
    for swiglu in (False, True):
        case = Case(68, 256, True, swiglu, False, 1)
        kernel = emulation(case)
        case.run(kernel)
        rows = sorted((address - case.weight.data_ptr(), size) for address, size in kernel.fetched.tolist())
        assert rows == [(512 * row, 512) for row in range(68)]


@either
@pytest.mark.parametrize("tokens", [1, 5])
def test_bad_numbers_come_through(tokens: int) -> None:
    for name in ("gqkv", "gate_up", "down") if ON_GPU else ("other",):
        for bad in (float("nan"), float("inf")):
            case = Case(*PROJECTIONS[name], tokens, seed=1)
            case.x[0, 3] = bad
            got = case.run(None if ON_GPU else Emulated(Geometry.of(*PROJECTIONS[name], 132)))
            assert not got[0].isfinite().any()
            assert got[1:].isfinite().all()


BROKEN = {
    "the kernel before": ("  wait_for_last_kernel();\n", ""),
    "a slot's rows": ("if (i < there) wait(&ring.full[(begin + i) % SLOTS], (begin + i) / SLOTS & 1);", ";"),
    "room in the ring": ("    if (i >= SLOTS) wait(&ring.empty[slot], i / SLOTS - 1 & 1);\n", ""),
    "the last product": ("  sync_consumers();  // nobody reads a slot any more, and none is on its way\n", ""),
}


@emulated
@pytest.mark.parametrize("name", BROKEN)
def test_the_emulation_sees_what_is_not_waited_for(name: str) -> None:
    case = Case(96, 256, True, False, False, 2)
    edit = projections.replacing(*BROKEN[name])
    assert projections.goes_wrong(case, (emulation(case, seed, edit) for seed in range(5)))


# ---- Where it runs


def test_what_is_refused() -> None:
    shapes = [(*projection, 0) for projection in PROJECTIONS.values()]
    device = torch.device(DEVICE)
    assert "float32" in str(why_not(shapes, torch.float32, device))
    assert ON_GPU or "Hopper" in str(why_not(shapes, torch.bfloat16, device))
    assert not ON_GPU or "(96, 48)" in str(why_not([(96, 48, False, False, True, 0)], torch.bfloat16, device))
    assert not ON_GPU or why_not(shapes, torch.bfloat16, device) is None
    assert fits(6144, 1536) and fits(1536, 4096) and not fits(66, 128) and not fits(64, 1 << 15)


def test_neighbours_fit_on_a_multiprocessor() -> None:
    """Shared memory, threads and registers of an H200, for what the comment at `TILES` says runs together."""
    tiles = {name: Geometry.of(*PROJECTIONS[name], 132) for name in staged.TILES}
    for names, attentions in (
        (("gqkv", "o"), 2),
        (("o", "gate_up"), 2),
        (("gate_up", "down"), 0),
        (("down", "gqkv"), 1),
    ):
        chosen = [tiles[name] for name in names]
        assert sum(each.shared_bytes + 1024 for each in chosen) + attentions * 2048 <= 228 * 1024, names
        registers = sum(each.threads * each.registers for each in chosen)
        assert registers + attentions * 64 * 96 <= 65536, names
    # A quarter of it has 16,384, and warps are dealt to quarters: 17 of down's, 9 of gqkv's, and one of attention's.
    dealt = [(tiles[name].threads // 128, tiles[name].registers) for name in ("down", "gqkv")] + [(1, REGISTERS)]
    assert sum(warps * 32 * -(-registers // 8) * 8 for warps, registers in dealt) <= 16384


@pytest.mark.parametrize("name", PROJECTIONS)
def test_compiles_for_hopper(name: str) -> None:
    projections.check_compiled(lambda: code_for(Geometry.of(*PROJECTIONS[name], 132)))


# ---- On a GPU


@gpu
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
def test_projections_equal_float64(name: str, tokens: int) -> None:
    for seed in range(4):
        case = Case(*PROJECTIONS[name], tokens, seed)
        assert error(case.run_in_poisoned_memory(), case.expected()) <= TOLERANCE


@gpu
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_a_chain_in_a_graph(tokens: int) -> None:
    names = ("gqkv", "narrow", "gate_up", "down")
    projections.check_chain_in_a_graph([Case(*PROJECTIONS[name], tokens, seed=1) for name in names])


@gpu
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_step_on_them_equals_one_on_triton(tokens: int) -> None:
    plan = RecurrencePlan(2, 1, 2)
    shape = HrmTextShape(plan, 256, 384, 2, 64, 16, 4096, 10000.0, 1e-6, 1.0, False, True)
    projections.check_step(shape, tokens, "why_not_staged")
