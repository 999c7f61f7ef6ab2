"""Products of many tokens on Hopper, what follows them in their epilogues: GEMMs of quack, which both engines require.

cuBLAS writes [gate | up], and another kernel reads it all back. Here the thread that has a gate and its up in registers
writes their SwiGLU, and the one that adds a product to the residual counts the squares for the next norm.
"""

from collections.abc import Callable
from typing import Any

import torch
from quack.activation import swiglu
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.math import unpack
from quack.epilogue.ops import ColVecLoad, ColVecReduce

from hrm_text.kernels.pointwise import PrefillBatch, factors_of
from hrm_text.kernels.products import ADD_COLUMNS, CublasProducts
from hrm_text.kernels.quack_gqkv import Gqkv, fit, version_of


def tile(tokens: int, rows: int, pingpong: bool, cluster: tuple[int, int]) -> dict[str, Any]:
    """What a CTA computes, two groups of warps together or (`pingpong`) in turn; clusters share what they read."""
    cluster_m, cluster_n = cluster
    return {"tile_M": tokens, "tile_N": rows, "pingpong": pingpong, "cluster_M": cluster_m, "cluster_N": cluster_n}


# The fastest at 16,384 tokens of the 1B.
ADD_TILE = tile(128, ADD_COLUMNS, True, (1, 2))
SWIGLU_TILE = tile(128, 128, True, (1, 2))
VERSION = version_of(__file__)


def epilogue(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`gemm_epilogue` for a function of this file, under a name of its version."""

    def wrap(function: Callable[..., Any]) -> Any:
        function.__qualname__ += VERSION
        return gemm_epilogue(**options)(function)

    return wrap


@epilogue(reduces={"squares": ColVecReduce("squares", scaled=True)})
def _add(acc: Any, c: Any) -> dict[str, Any]:
    total = acc + c
    return {"D": total, "squares": (total, total)}


@epilogue(outputs=("out",), ops={"factor": ColVecLoad("factor")}, mode="acc_pair")
def _swiglu(acc: Any, factor: Any) -> dict[str, Any]:
    gate, up = unpack(acc * factor)
    return {"out": swiglu(gate, up)}


class QuackProducts:
    """`hrm_text.kernels.products.Products` in bfloat16; the first call of each compiles it, for all shapes."""

    def __init__(self) -> None:
        self._gqkv = Gqkv()

    def gqkv(
        self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor, batch: PrefillBatch, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not fit(*caches):
            return CublasProducts().gqkv(x, factors, weight, batch, *caches)
        return self._gqkv(x, factors, weight, batch, *caches), None

    def add(self, x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        tokens, width = x.shape
        # The squares are those of the sum before it is rounded: of 1,536 numbers that is nothing.
        squares = torch.empty(tokens, -(-width // ADD_COLUMNS), dtype=torch.float32, device=x.device)
        _add.gemm(a, weight, x, x, epi_args={"squares": squares}, **ADD_TILE)
        return squares

    def factors(self, x: torch.Tensor, squares: torch.Tensor | None, eps: float) -> torch.Tensor:
        assert squares is not None
        return factors_of(squares, x.shape[1], eps)

    def swiglu(self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
        operands = {"factor": factors[None], "out": out}
        _swiglu.gemm(x, weight, None, None, epi_args=operands, concat_layout=("B",), **SWIGLU_TILE)
        return out
