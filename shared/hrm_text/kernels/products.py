"""The products of a step with prompts, each with what the model does to it: cuBLAS's GEMMs and a kernel behind them.

Those of many tokens are quack's, where it is installed (`quack_products.py`), with all of that in their epilogues.
"""

import functools
import logging
from typing import Protocol

import torch
from torch.nn.functional import linear

from hrm_text.kernels.launch import capability
from hrm_text.kernels.pointwise import rms, swiglu

# On an H200 a layer's four products take quack and cuBLAS: 214 and 229 us of 2,048 tokens, 130 and 114 of 1,024.
MANY_TOKENS = 2048
logger = logging.getLogger(__name__)


class Products(Protocol):
    """Weights are (rows, columns), contiguous, as is every x."""

    def plain(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(tokens, rows) W x."""

    def add(self, x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add W a to (tokens, rows) x in place, and return the (tokens,) float32 RMSNorm factors of the sum."""

    def swiglu(self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(tokens, rows / 2) silu(gate) * up of [gate | up] = W x times each token's factor."""


class CublasProducts:
    """Of any number of tokens."""

    def plain(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight)

    def add(self, x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x.addmm_(a, weight.t())  # in place, for torch copies what it adds to otherwise
        return rms(x, eps)

    def swiglu(self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return swiglu(linear(x, weight), factors)


def products_for(tokens: int, dtype: torch.dtype, device: torch.device) -> Products:
    """The faster ones of a step of so many tokens."""
    many = products_of_many(dtype, device) if tokens >= MANY_TOKENS else None
    return many or CublasProducts()


@functools.cache
def products_of_many(dtype: torch.dtype, device: torch.device) -> Products | None:
    """Quack's, compiled and tried; None where they do not run. The first call must come before a capture."""
    if dtype != torch.bfloat16 or capability(device) != 9:
        return None
    try:
        from hrm_text.kernels.quack_products import QuackProducts

        products = QuackProducts()
        try_out(products, device)
    except Exception as error:  # whatever a compiler of another version raises
        logger.warning("HRM-Text: products of %d tokens and more run on cuBLAS, not on quack: %r", MANY_TOKENS, error)
        return None
    return products


def try_out(products: Products, device: torch.device) -> None:
    """Run each of `products` once.

    Raises:
        RuntimeError: the result is not what cuBLAS and our kernels find.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(scale).bfloat16()

    x, weight, out = normal(300, 256), normal(512, 256, scale=1 / 16), normal(300, 512)
    factors, reference = rms(x, 1e-6), CublasProducts()
    found = []
    for each in (products, reference):
        total = out.clone()
        norms = each.add(total, x, weight, 1e-6)
        found.append((each.plain(x, weight), total, norms, each.swiglu(x, factors, weight)))
    for name, mine, expected in zip(("plain", "add", "its factors", "swiglu"), *found, strict=True):
        error = float((mine.float() - expected.float()).norm() / expected.float().norm())
        if not error <= 1e-2:
            raise RuntimeError(f"{name}: off by {error:.3g}, relative to the whole")
