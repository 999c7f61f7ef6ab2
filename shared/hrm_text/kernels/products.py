"""The products of a step with prompts, each with what the model does to it: cuBLAS's GEMMs and a kernel behind them.

Those of many tokens are quack's, where it is installed (`quack_products.py`), with all of that in their epilogues.
"""

import functools
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Protocol

import torch
from torch.nn.functional import linear

from hrm_text.kernels.launch import capability
from hrm_text.kernels.pointwise import rms, swiglu

# More than graphs have (`prefill_graphs.SIZES`), so that none is captured while quack is still compiled. A layer's four
# products take quack and cuBLAS 398 and 437 us of 4,096 tokens on an H200, 214 and 229 of 2,048, 130 and 114 of 1,024.
MANY_TOKENS = 2561
ADD_COLUMNS = 192  # of a tile of quack's `add`, which leaves the sum of their squares
logger = logging.getLogger(__name__)


class Products(Protocol):
    """Weights are (rows, columns), contiguous, as is every x."""

    def scaled(
        self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens, rows) W x, and the (tokens,) factors that it still lacks; None where it has them."""

    def add(self, x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """Add W a to (tokens, rows) x in place; what is returned `factors` takes."""

    def factors(self, x: torch.Tensor, squares: torch.Tensor | None, eps: float) -> torch.Tensor:
        """The (tokens,) float32 RMSNorm factors of x, behind an `add` to it."""

    def swiglu(self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(tokens, rows / 2) silu(gate) * up of [gate | up] = W x times each token's factor."""


class CublasProducts:
    """Of any number of tokens."""

    def scaled(
        self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return linear(x, weight), factors

    def add(self, x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor) -> None:
        x.addmm_(a, weight.t())  # in place, for torch copies what it adds to otherwise

    def factors(self, x: torch.Tensor, squares: torch.Tensor | None, eps: float) -> torch.Tensor:
        return rms(x, eps)

    def swiglu(self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return swiglu(linear(x, weight), factors)


def products_for(tokens: int, dtype: torch.dtype, device: torch.device) -> Products:
    """The faster ones of a step of so many tokens."""
    many = products_of_many(dtype, device) if tokens >= MANY_TOKENS else None
    return many or CublasProducts()


def products_of_many(dtype: torch.dtype, device: torch.device) -> Products | None:
    """Quack's, compiled and tried; None where they do not run. Not to be called first in a capture."""
    begun = begin(dtype, device)
    return None if begun is None else begun.result()


def begin(dtype: torch.dtype, device: torch.device) -> "Future[Products | None] | None":
    """Have a thread import and compile what `products_of_many` waits for; None where nothing is to come of it.

    Nobody may capture a CUDA graph before it has ended, for it allocates memory.
    """
    if dtype != torch.bfloat16 or capability(device) != 9:
        return None
    with _one_at_a_time:
        return _begun(torch.cuda.current_device() if device.index is None else device.index)


_one_at_a_time = Lock()


@functools.cache
def _begun(index: int) -> "Future[Products | None]":
    return ThreadPoolExecutor(1, "quack").submit(_prepared, torch.device("cuda", index))


def _prepared(device: torch.device) -> Products | None:
    try:
        from hrm_text.kernels.quack_products import QuackProducts

        products = QuackProducts()
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)), torch.inference_mode():
            try_out(products, device)
    except Exception as error:  # whatever a compiler of another version raises
        logger.warning("HRM-Text: products of %d tokens and more run on cuBLAS, not on quack: %r", MANY_TOKENS, error)
        return None
    return products


def try_out(products: Products, device: torch.device) -> None:
    """Run each of `products` once.

    Raises:
        RuntimeError: the result is not what torch finds.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(scale).bfloat16()

    x, weight, out = normal(300, 256), normal(1536, 256, scale=1 / 16), normal(300, 1536)
    factors, wide = torch.rand(300, generator=generator, device=device), x.float() @ weight.float().t()
    scaled, total = wide * factors[:, None], out.float() + wide
    gate, up = scaled.chunk(2, -1)
    expected = {"scaled": scaled, "add": total, "its factors": torch.rsqrt(total.square().mean(-1) + 1e-6)}
    expected["swiglu"] = torch.nn.functional.silu(gate) * up

    product, left = products.scaled(x, factors, weight)
    norms = products.factors(out, products.add(out, x, weight), 1e-6)
    found = product if left is None else product * left[:, None], out, norms, products.swiglu(x, factors, weight)
    for (name, right), mine in zip(expected.items(), found, strict=True):
        error = float((mine.float() - right).norm() / right.norm())
        if not error <= 1e-2:
            raise RuntimeError(f"{name}: off by {error:.3g}, relative to the whole")
