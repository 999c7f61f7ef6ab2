"""Projections whose weights wait in shared memory against float64: on a GPU, and emulated on a CPU.

The emulation runs the kernel's own source, a fiber for each CUDA thread, copies and the end of the kernel before late
and in random order. So what it shows of the ring and of what is waited for does not hang on a model of them.
"""

import shutil
from math import ceil

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from hrm_text.config import HrmTextShape
from hrm_text.kernels import staged
from hrm_text.kernels.attention import REGISTERS, DecodeBatch
from hrm_text.kernels.decode import FusedDecode
from hrm_text.kernels.staged import (
    COPIES,
    Geometry,
    code_for,
    fits,
    in_blocks,
    in_rows,
    slot_bytes,
    staged_linear,
    why_not,
)
from hrm_text.model import HrmTextBody
from hrm_text.plain import PlainLayers, rope_table
from hrm_text.plan import RecurrencePlan
from tests.kernels.conftest import DEVICE
from tests.kernels.emulation import Edit, Emulated
from tests.kernels.test_linear import EPS, error, expected_linear

ON_GPU = DEVICE == "cuda"
gpu = pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
emulated = pytest.mark.skipif(ON_GPU or shutil.which("g++") is None, reason="emulates on a CPU, with g++")
TOLERANCE = 5e-3  # of bfloat16
# rows, width, norm, swiglu, residual
PROJECTIONS = {
    "gqkv": (6144, 1536, True, False, False),
    "o": (1536, 1536, False, False, True),
    "gate_up": (8192, 1536, True, True, False),
    "down": (1536, 4096, False, False, True),
    "narrow": (1536, 6144, False, False, True),  # a ring of one slot
    "other": (676, 896, True, True, False),  # a quad for some CTAs and two for others, slices for 4 warps
}


class Case:
    """A projection with random numbers, and what it comes to."""

    def __init__(
        self, rows: int, width: int, norm: bool, swiglu: bool, residual: bool, tokens: int, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(DEVICE, torch.bfloat16)

        # Small enough, at times, for the norm's epsilon to matter.
        self.x = normal(tokens, width, scale=3.0 if seed % 2 else 1e-3 if norm else 1.0)
        self.weight = normal(rows, width, scale=width**-0.5)
        self.residual = normal(tokens, rows, scale=0.1) if residual else None
        self.norm, self.swiglu = norm, swiglu

    def expected(self) -> torch.Tensor:
        return expected_linear(self.x, self.weight, self.norm, self.swiglu, self.residual)

    def run(self, kernel: staged.Launch | None = None, copies: int = 0) -> torch.Tensor:
        """(tokens, outputs), or copies of it in blocks."""
        residual = None if self.residual is None else in_blocks(self.residual)
        return self.run_in_blocks(in_blocks(self.x), residual, kernel, copies)

    def run_in_blocks(
        self, x: torch.Tensor, residual: torch.Tensor | None, kernel: staged.Launch | None, copies: int
    ) -> torch.Tensor:
        eps = EPS if self.norm else None
        return staged_linear(
            x, self.weight, norm_eps=eps, swiglu=self.swiglu, residual=residual, copies=copies, kernel=kernel
        )


# ---- On a CPU


def emulation(case: Case, seed: int = 0, edit: Edit = lambda text: text, **sizes: int) -> Emulated:
    rows, width = case.weight.shape
    chosen = {"ctas": 3, "warps": 4, "slots": 3, "registers": 64} | sizes
    return Emulated(Geometry(rows, width, case.norm, case.swiglu, case.residual is not None, **chosen), seed, edit)


@emulated
@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.generate],
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    width=st.sampled_from([128, 256, 384]),
    quads=st.integers(3, 17),
    kind=st.sampled_from([(True, False, False), (False, False, True), (True, True, False), (False, True, False)]),
    tokens=st.integers(1, 8),
    ctas=st.integers(1, 3),
    slots=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_emulated_projections_equal_float64(
    width: int, quads: int, kind: tuple[bool, bool, bool], tokens: int, ctas: int, slots: int, seed: int
) -> None:
    quads = max(8, quads // 8 * 8) if kind[2] else quads  # whole blocks of the residual
    case = Case(4 * quads, width, *kind, tokens, seed)
    tile, warps = min(4, slots), 4
    sums = 4 * warps * 8 * (4 * tile + (0 if tile % 2 else 4)) * ceil(ceil(quads / ctas) / tile)
    assume(sums <= slots * slot_bytes(width))  # which take the ring's place
    kernel = emulation(case, seed, ctas=ctas, slots=slots, warps=warps)
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


@pytest.mark.skipif(not ON_GPU and shutil.which("g++") is None, reason="emulates with g++")
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


@pytest.mark.skipif(not ON_GPU and shutil.which("g++") is None, reason="emulates with g++")
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
    def edit(text: str) -> str:
        assert BROKEN[name][0] in text
        return text.replace(*BROKEN[name])

    case = Case(96, 256, True, False, False, 2)
    wrong = 0
    for seed in range(5):
        try:
            wrong += not error(case.run(emulation(case, seed, edit)), case.expected()) <= 10 * TOLERANCE
        except RuntimeError as reason:  # what the hardware would not forgive either
            assert "arrival" in str(reason)
            wrong += 1
    assert wrong


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
    pytest.importorskip("cuda.bindings.nvrtc")
    try:
        code = code_for(Geometry.of(*PROJECTIONS[name], 132))
    except Exception as reason:  # the bindings raise what they like when a library is not there
        if "NVRTC:" in str(reason):
            raise
        pytest.skip(f"no NVRTC: {reason}")
    assert code[:4] == b"\x7fELF"


# ---- On a GPU


@gpu
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
def test_projections_equal_float64(name: str, tokens: int) -> None:
    for seed in range(4):
        case = Case(*PROJECTIONS[name], tokens, seed)
        # What the output's memory held: the next tensor of its size takes it.
        poison = torch.full_like(case.expected(), float("nan"), dtype=torch.bfloat16)
        del poison
        assert error(case.run(), case.expected()) <= TOLERANCE


@gpu
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_a_chain_in_a_graph(tokens: int) -> None:
    """Each kernel starts before its input is there: what they write holds NaN until then. Replays agree to the bit."""
    chain = [Case(*PROJECTIONS[name], tokens, seed=1) for name in ("gqkv", "narrow", "gate_up", "down")]
    x = in_blocks(chain[0].x)
    given = x.clone()

    def run() -> list[torch.Tensor]:
        written = [x]
        for _ in range(6):
            for case in chain:
                residual = None if case.residual is None else written[-2]
                written.append(case.run_in_blocks(written[-1], residual, None, 1))
        return written

    first = [each.clone() for each in run()]
    for i in range(len(chain)):
        chain[i].x = in_rows(first[i])
        chain[i].residual = in_rows(first[i - 1]) if chain[i].residual is not None else None
        assert error(in_rows(first[i + 1]), chain[i].expected()) <= TOLERANCE
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = run()
    for _ in range(300):
        for each in written:
            each.fill_(float("nan"))
        x.copy_(given)
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(written, first, strict=True))


@gpu
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_step_on_them_equals_one_on_triton(tokens: int) -> None:
    plan = RecurrencePlan(2, 1, 2)
    shape = HrmTextShape(plan, 256, 384, 2, 64, 16, 4096, 10000.0, 1e-6, 1.0, False, True)
    body = HrmTextBody(shape, PlainLayers(), "model").to(DEVICE, torch.bfloat16)
    torch.manual_seed(tokens)
    for parameter in body.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    x = torch.randn(tokens, 256, device=DEVICE, dtype=torch.bfloat16)
    cache = torch.randn(plan.num_slots, 2, 16 * tokens, 1, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    table = torch.arange(16 * tokens, device=DEVICE).view(tokens, 16)
    batch = DecodeBatch(
        positions=torch.full((tokens,), 15, device=DEVICE),
        write_slots=table[:, -1].contiguous(),
        table=table.int(),
        row_starts=None,
        lengths=torch.full((tokens,), 16, dtype=torch.int32, device=DEVICE),
        page_size=1,
        cos_sin=rope_table(shape).to(DEVICE),
    )
    fused = FusedDecode(body, torch.device(DEVICE))
    steps = []
    for reason in (None, "compared with"):
        assert fused.why_not_staged is None
        fused.why_not_staged = reason
        z_H, z_L = body.begin(x)
        steps.append(fused(z_H, z_L.contiguous(), batch, lambda slot: (cache[slot, 0], cache[slot, 1])).double())
    assert error(*steps) <= 4 * TOLERANCE  # which 8 layer calls add up to
