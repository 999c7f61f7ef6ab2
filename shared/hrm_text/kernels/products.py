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
from hrm_text.kernels.pointwise import PrefillBatch, rms, rope_write, swiglu

# More than graphs have (`prefill_graphs.SIZES`), so that none is captured while quack is still compiled. A layer's four
# products take quack and cuBLAS 398 and 437 us of 4,096 tokens on an H200, 214 and 229 of 2,048, 130 and 114 of 1,024.
MANY_TOKENS = 2561
ADD_COLUMNS = 192  # of a tile of quack's `add`, which leaves the sum of their squares
logger = logging.getLogger(__name__)


class Products(Protocol):
    """Weights are (rows, columns), contiguous, as is every x."""

    def gqkv(
        self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor, batch: PrefillBatch, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[gate | q | k | v] = W x times each token's factor, q and k rotated, k and v in the `caches` as well, all as
        `rope_write` does it; and the (tokens,) factors that the gate still lacks, None where it has them."""

    def add(self, x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """Add W a to (tokens, rows) x in place; what is returned `factors` takes."""

    def factors(self, x: torch.Tensor, squares: torch.Tensor | None, eps: float) -> torch.Tensor:
        """The (tokens,) float32 RMSNorm factors of x, behind an `add` to it."""

    def swiglu(self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(tokens, rows / 2) silu(gate) * up of [gate | up] = W x times each token's factor."""


class CublasProducts:
    """Of any number of tokens."""

    def gqkv(
        self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor, batch: PrefillBatch, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        product = linear(x, weight)
        rope_write(product, factors, batch, *caches)
        return product, factors

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

    heads, head_dim, tokens = 3, 128, 300
    x, weight = normal(tokens, 256), normal(4 * heads * head_dim, 256, scale=1 / 16)
    factors, out = torch.rand(tokens, generator=generator, device=device), normal(tokens, len(weight))
    slots = torch.randperm(320, generator=generator, device=device)[:tokens]
    batch = PrefillBatch(slots % 64, slots, 16, normal(64, head_dim))
    caches = torch.zeros(2, 20, 16, heads, head_dim, dtype=x.dtype, device=device)
    wide = x.float() @ weight.float().t()
    scaled, total = wide * factors[:, None], out.float() + wide
    gate, up = scaled.chunk(2, -1)
    gqkv = scaled.view(tokens, 4, heads, head_dim).clone()
    gqkv[:, 1:3] = turned(gqkv[:, 1:3], batch.cos_sin[batch.positions, None, None].float())
    expected = {"gqkv": gqkv, "its KV": gqkv[:, 2:], "add": total}
    expected["its factors"] = torch.rsqrt(total.square().mean(-1) + 1e-6)
    expected["swiglu"] = torch.nn.functional.silu(gate) * up

    product, left = products.gqkv(x, factors, weight, batch, *caches)
    product = product.float().view_as(gqkv)
    product[:, 0] *= 1 if left is None else left[:, None, None]
    written = caches.flatten(1, 2)[:, slots].transpose(0, 1)
    norms = products.factors(out, products.add(out, x, weight), 1e-6)
    found = product, written, out, norms, products.swiglu(x, factors, weight)
    for (name, right), mine in zip(expected.items(), found, strict=True):
        error = float((mine.float() - right).norm() / right.norm())
        if not error <= 1e-2:
            raise RuntimeError(f"{name}: off by {error:.3g}, relative to the whole")


def turned(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """(..., head_dim) x behind RoPE with (..., head_dim) [cos | sin]."""
    (cos, sin), (first, second) = cos_sin.chunk(2, -1), x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
