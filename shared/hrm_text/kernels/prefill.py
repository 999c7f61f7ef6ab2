"""A step of any tokens with attention left to the engine: four GEMMs a layer, and what stands between them."""

from collections.abc import Callable

import torch

from hrm_text.kernels.decode import KVCaches
from hrm_text.kernels.pointwise import PrefillBatch, add_rms, gate_in_place, norm, rope_write
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
        self, z_H: torch.Tensor, z_L: torch.Tensor, batch: PrefillBatch, caches: KVCaches, attend: Attend
    ) -> torch.Tensor:
        """z_H after every step.

        Args:
            z_H, z_L: (tokens, hidden), as `HrmTextBody.begin` makes them.
            batch: of these tokens.
            caches: (k_cache, v_cache) of a KV slot, as `rope_write` takes them.
            attend: the engine's attention.
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
                squares = self.layer(x, factors, layer, products, batch, slot, caches, attend)
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
        self.layer(x, factors, weights_of(block), products, batch, slot, caches, attend)
        return norm(x, self.eps)

    def layer(
        self,
        x: torch.Tensor,
        factors: torch.Tensor,
        weights: Weights,
        products: Products,
        batch: PrefillBatch,
        slot: int,
        caches: KVCaches,
        attend: Attend,
    ) -> torch.Tensor | None:
        """Changes (tokens, hidden) x, whose norm's factors are given, to what it is behind the layer.

        Returns:
            What `products.factors` takes for the new x.
        """
        tokens, heads, head_dim = len(x), self.body.shape.num_heads, self.body.shape.head_dim
        gqkv_proj, o_proj, gate_up_proj, down_proj = weights
        gqkv, factors = products.scaled(x, factors, gqkv_proj)
        rope_write(gqkv, factors, batch, *caches(slot))
        _, q, k, v = gqkv.view(tokens, 4, heads, head_dim).unbind(1)
        out = attend(slot, q, k, v).view(tokens, heads * head_dim)
        gate_in_place(gqkv, factors, out)
        factors = products.factors(x, products.add(x, out, o_proj), self.eps)
        return products.add(x, products.swiglu(x, factors, gate_up_proj), down_proj)


def weights_of(block: Block) -> Weights:
    """The projections of a layer."""
    attention, mlp = block.self_attn, block.mlp
    return attention.gqkv_proj.weight, attention.o_proj.weight, mlp.gate_up_proj.weight, mlp.down_proj.weight


def first_layer(body: HrmTextBody) -> tuple[Block, int]:
    """A layer that this stage runs, and its KV slot."""
    step = body.stage[0]
    stack = body.L_module if body.steps[step] == "L" else body.H_module
    return stack.layers[0], body.shape.plan.slot(step, 0)
