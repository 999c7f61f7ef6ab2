"""A step of any tokens with attention left to the engine: four GEMMs a layer, and what stands between them."""

from collections.abc import Callable

import torch

from hrm_text.kernels.decode import KVCaches
from hrm_text.kernels.pointwise import PrefillBatch, add_rms, gate_in_place, norm
from hrm_text.kernels.products import Products, products_for
from hrm_text.model import Block, HrmTextBody

# (slot, q, k, v) -> out: attention over KV slot `slot`, whose cache has k and v; each (tokens, heads, head_dim), and
# out contiguous.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class FusedPrefill:
    """Runs a body's recurrence, where `hrm_text.kernels.decode.why_not` has nothing against it.

    Args:
        body: with its weights loaded, all of the stages its own.
    """

    def __init__(self, body: HrmTextBody) -> None:
        self.body = body
        self.eps = body.shape.rms_norm_eps

    def __call__(
        self,
        z_H: torch.Tensor,
        z_L: torch.Tensor,
        batch: PrefillBatch,
        caches: KVCaches,
        attend: Attend,
        read: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """z_H after every step.

        Args:
            z_H, z_L: (tokens, hidden), as `HrmTextBody.begin` makes them.
            batch: of these tokens.
            caches: (k_cache, v_cache) of a KV slot, as `rope_write` takes them.
            attend: the engine's attention.
            read: the rows of z_H, integer, that the engine will read, None for all: behind the last attention nothing
                else is computed, and what it does not read is NaN.
        """
        body = self.body
        stacks = {"L": body.L_module, "H": body.H_module}
        weights = {kind: [weights_of(block) for block in stack.layers] for kind, stack in stacks.items()}
        z_L, products = z_L.contiguous(), products_for(len(z_H), z_H.dtype, z_H.device)
        for step in body.stage:
            kind = body.steps[step]
            x, factors = add_rms(z_L, z_H, self.eps)
            squares: torch.Tensor | None = None
            for index, layer in enumerate(weights[kind]):
                slot = body.shape.plan.slot(step, index)
                if index:
                    factors = products.factors(x, squares, self.eps)
                gqkv, left, out = self.attended(x, factors, layer, products, batch, slot, caches, attend)
                if read is not None and step == body.stage[-1] and layer is weights[kind][-1]:
                    return self.rows(read, x, gqkv, left, out, layer)
                squares = self.behind(x, gqkv, left, out, layer, products)
            z = norm(x, self.eps)
            z_L, z_H = (z, z_H) if kind == "L" else (z_L, z)
        return z_H

    def one_layer(
        self, z_H: torch.Tensor, z_L: torch.Tensor, batch: PrefillBatch, caches: KVCaches, attend: Attend
    ) -> torch.Tensor:
        """A pass of a stack of one layer: every kernel of a whole step, to have them compiled and loaded."""
        block, slot = first_layer(self.body)
        x, factors = add_rms(z_L.contiguous(), z_H, self.eps)
        products = products_for(len(x), x.dtype, x.device)
        attended = self.attended(x, factors, weights_of(block), products, batch, slot, caches, attend)
        self.behind(x, *attended, weights_of(block), products)
        return norm(x, self.eps)

    def attended(
        self,
        x: torch.Tensor,
        factors: torch.Tensor,
        weights: Weights,
        products: Products,
        batch: PrefillBatch,
        slot: int,
        caches: KVCaches,
        attend: Attend,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """A layer of (tokens, hidden) x, whose norm's factors are given, as far as attention; KV is in the cache then.

        Returns:
            [gate | q | k | v], the factors that the gate still lacks, and what attention found.
        """
        tokens, heads, head_dim = len(x), self.body.shape.num_heads, self.body.shape.head_dim
        gqkv, left = products.gqkv(x, factors, weights[0], batch, *caches(slot))
        _, q, k, v = gqkv.view(tokens, 4, heads, head_dim).unbind(1)
        return gqkv, left, attend(slot, q, k, v).view(tokens, heads * head_dim)

    def behind(
        self,
        x: torch.Tensor,
        gqkv: torch.Tensor,
        left: torch.Tensor | None,
        out: torch.Tensor,
        weights: Weights,
        products: Products,
    ) -> torch.Tensor | None:
        """Changes x to what it is behind the layer, given what `attended` returned.

        Returns:
            What `products.factors` takes for the new x.
        """
        _, o_proj, gate_up_proj, down_proj = weights
        gate_in_place(gqkv, left, out)
        factors = products.factors(x, products.add(x, out, o_proj), self.eps)
        return products.add(x, products.swiglu(x, factors, gate_up_proj), down_proj)

    def rows(
        self,
        read: torch.Tensor,
        x: torch.Tensor,
        gqkv: torch.Tensor,
        left: torch.Tensor | None,
        out: torch.Tensor,
        weights: Weights,
    ) -> torch.Tensor:
        """z_H in the rows `read`, given what `attended` returned of the last layer; NaN in all others."""
        own, products = x[read], products_for(len(read), x.dtype, x.device)
        self.behind(own, gqkv[read], None if left is None else left[read], out[read], weights, products)
        z_H = torch.full_like(x, float("nan"))
        z_H[read] = norm(own, self.eps)
        return z_H


def weights_of(block: Block) -> Weights:
    """The projections of a layer."""
    attention, mlp = block.self_attn, block.mlp
    return attention.gqkv_proj.weight, attention.o_proj.weight, mlp.gate_up_proj.weight, mlp.down_proj.weight


def first_layer(body: HrmTextBody) -> tuple[Block, int]:
    """A layer that this stage runs, and its KV slot."""
    step = body.stage[0]
    stack = body.L_module if body.steps[step] == "L" else body.H_module
    return stack.layers[0], body.shape.plan.slot(step, 0)
