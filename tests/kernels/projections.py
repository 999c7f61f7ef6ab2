"""Projections in CUDA for the tests of `staged.cu` and `streamed.cu`: cases, chains, and steps of a model on them."""

import shutil
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from hrm_text.config import HrmTextShape
from hrm_text.kernels.attention import DecodeBatch
from hrm_text.kernels.decode import FusedDecode
from hrm_text.kernels.staged import Launch, in_blocks, in_rows, staged_linear
from hrm_text.model import HrmTextBody
from hrm_text.plain import PlainLayers, rope_table
from tests.kernels.conftest import DEVICE
from tests.kernels.emulation import Edit, Emulated
from tests.kernels.test_linear import EPS, error, expected_linear

ON_GPU = DEVICE == "cuda"
gpu = pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
emulated = pytest.mark.skipif(ON_GPU or shutil.which("g++") is None, reason="emulates on a CPU, with g++")
either = pytest.mark.skipif(not ON_GPU and shutil.which("g++") is None, reason="emulates with g++")
TOLERANCE = 5e-3  # of bfloat16
GENERATED = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.generate],
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
# The 1B's rows, width, norm, swiglu, residual
PROJECTIONS = {
    "gqkv": (6144, 1536, True, False, False),
    "o": (1536, 1536, False, False, True),
    "gate_up": (8192, 1536, True, True, False),
    "down": (1536, 4096, False, False, True),
}


class Case:
    """A projection with random numbers, and what it comes to."""

    def __init__(
        self,
        rows: int,
        width: int,
        norm: bool,
        swiglu: bool,
        residual: bool,
        tokens: int,
        seed: int = 0,
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

    def run(self, kernel: Launch | None = None) -> torch.Tensor:
        """(tokens, outputs)."""
        residual = None if self.residual is None else in_blocks(self.residual)
        return self.run_in_blocks(in_blocks(self.x), residual, kernel, copies=0)

    def run_in_blocks(
        self, x: torch.Tensor, residual: torch.Tensor | None, kernel: Launch | None, copies: int
    ) -> torch.Tensor:
        eps = EPS if self.norm else None
        return staged_linear(
            x, self.weight, norm_eps=eps, swiglu=self.swiglu, residual=residual, copies=copies, kernel=kernel
        )

    def run_in_poisoned_memory(self) -> torch.Tensor:
        """On the GPU; what the output's memory held is NaN, for the next tensor of its size takes it."""
        poison = torch.full_like(self.expected(), float("nan"), dtype=torch.bfloat16)
        del poison
        return self.run()


def replacing(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return edit


def goes_wrong(case: Case, kernels: Iterable[Emulated]) -> bool:
    """Whether one of the kernels computes something else, or does what the hardware would not forgive."""
    for kernel in kernels:
        try:
            if not error(case.run(kernel), case.expected()) <= 10 * TOLERANCE:
                return True
        except RuntimeError as reason:
            assert "emulation:" in str(reason)
            return True
    return False


def check_compiled(compile_code: Callable[[], bytes]) -> None:
    """For Hopper, where NVRTC is."""
    pytest.importorskip("cuda.bindings.nvrtc")
    try:
        code = compile_code()
    except Exception as reason:  # the bindings raise what they like when a library is not there
        if "NVRTC:" in str(reason):
            raise
        pytest.skip(f"no NVRTC: {reason}")
    assert code[:4] == b"\x7fELF"


def check_replays(
    run: Callable[[], list[torch.Tensor]],
    first: list[torch.Tensor],
    replays: int,
    restore: Callable[[], object] = lambda: None,
) -> None:
    """In a graph `run` writes what it wrote `first`, to the bit, though all of it holds NaN, but for what `restore`
    writes, before each replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = run()
    for _ in range(replays):
        for each in written:
            each.fill_(float("nan"))
        restore()
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(written, first, strict=True))


def check_chain_in_a_graph(chain: list[Case]) -> None:
    """Each kernel starts before its input is there: what they write holds NaN until then. Replays agree to the bit."""
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
    check_replays(run, first, 300, lambda: x.copy_(given))


def check_step(shape: HrmTextShape, tokens: int, why_not: str) -> None:
    """A step equals one on Triton, which a reason in the attribute `why_not` of `FusedDecode`, or of its attention,
    makes of it."""
    body = HrmTextBody(shape, PlainLayers(), "model").to(DEVICE, torch.bfloat16)
    torch.manual_seed(tokens)
    for parameter in body.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    heads, size = shape.num_heads, shape.head_dim
    ids = torch.randint(shape.vocab_size, (tokens,), device=DEVICE)
    cache = torch.randn(shape.plan.num_slots, 2, 16 * tokens, 1, heads, size, device=DEVICE, dtype=torch.bfloat16)
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
    steps, owner = [], fused if hasattr(fused, why_not) else fused.attention
    for reason in (None, "compared with"):
        assert getattr(owner, why_not) is None
        setattr(owner, why_not, reason)
        steps.append(fused(ids, batch, lambda slot: (cache[slot, 0], cache[slot, 1])).double())
    assert error(*steps) <= 4 * TOLERANCE  # which 8 layer calls add up to
