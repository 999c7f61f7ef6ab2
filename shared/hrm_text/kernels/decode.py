"""A decode step's recurrence on the fused kernels: five a layer, beyond 128 tokens two and four GEMMs.

Up to 32 tokens, projections are CUDA kernels whose weights wait in shared memory, where those run; else Triton's.

`FusedDecode` reads the weights of an `hrm_text.model.HrmTextBody`, so what it computes is that module's own function.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.functional import linear

from hrm_text.config import HrmTextShape
from hrm_text.kernels import clustered, staged
from hrm_text.kernels.attention import DecodeAttention, DecodeBatch
from hrm_text.kernels.clustered import clustered_linear
from hrm_text.kernels.gemm import MAX_TOKENS as MAX_TILED_TOKENS
from hrm_text.kernels.gemm import Projections
from hrm_text.kernels.linear import MAX_TOKENS, fits, small_linear
from hrm_text.kernels.pointwise import norm_add
from hrm_text.kernels.staged import COPIES, copies_for, in_blocks, staged_linear
from hrm_text.kernels.swiglu import scaled_swiglu
from hrm_text.model import Block, HrmTextBody

# Whether a layer's projections have a norm ahead, SwiGLU, and a residual behind them.
AROUND = {
    "gqkv_proj": (True, False, False),
    "o_proj": (False, False, True),
    "gate_up_proj": (True, True, False),
    "down_proj": (False, False, True),
}
KVCaches = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


class FusedDecode:
    """Runs a body's recurrence for one new token a request.

    Args:
        body: with its weights loaded, all of the stages its own.
        device: where they are.

    Attributes:
        why_not_staged: why no projection runs on `staged_linear`; None where those of its `MAX_TOKENS` do.
        why_not_clustered: the same of `clustered_linear`, for more tokens than that.
    """

    def __init__(self, body: HrmTextBody, device: torch.device) -> None:
        self.body = body
        shape = body.shape
        self.eps = shape.rms_norm_eps
        self.attention = DecodeAttention(shape.num_heads, shape.head_dim, device)
        shapes, dtype = weight_shapes(shape), next(body.parameters()).dtype
        self.project = Projections(list(shapes.values()), dtype, device)
        kinds = [(name, (*shapes[name], *AROUND[name])) for name in AROUND]
        # Attention reads rows of gqkv, a head's columns in one program.
        copied = [(*kind, copies) for name, kind in kinds for copies in ((0,) if name == "gqkv_proj" else (1, COPIES))]
        blocked = [(*kind, name != "gqkv_proj") for name, kind in kinds]
        with ThreadPoolExecutor(1) as pool:  # both compile
            clustered_off = pool.submit(clustered.why_not, blocked, dtype, device)
            self.why_not_staged = staged.why_not(copied, dtype, device)
            self.why_not_clustered = self.why_not_staged or clustered_off.result()
        self.attention.all_shared = self.why_not_staged is None

    def __call__(self, z_H: torch.Tensor, z_L: torch.Tensor, batch: DecodeBatch, caches: KVCaches) -> torch.Tensor:
        """z_H after every step.

        Args:
            z_H, z_L: (tokens, hidden), as `HrmTextBody.begin` makes them.
            batch: of these tokens.
            caches: (k_cache, v_cache) of a KV slot, as `DecodeAttention` takes them.
        """
        body, z_L = self.body, z_L.contiguous()
        x = self.laid_out(z_L + z_H)
        for step in body.stage:
            kind = body.steps[step]
            stack = body.L_module if kind == "L" else body.H_module
            for index, block in enumerate(stack.layers):
                x = self.block(x, block, batch, *caches(body.shape.plan.slot(step, index)))
            # One kernel from a stack to the next, launched as the others are, so that its weights are on their way.
            if kind == "L":
                z_L, x = norm_add(x, z_H, self.eps)
            else:
                z_H, x = norm_add(x, z_L, self.eps)
        return z_H

    def in_cuda(self, tokens: int) -> Callable[..., torch.Tensor] | None:
        """What runs the projections of so many tokens: `staged_linear`, `clustered_linear`, or None for Triton's."""
        if tokens <= staged.MAX_TOKENS:
            return None if self.why_not_staged else staged_linear
        if tokens <= clustered.MAX_TOKENS:
            return None if self.why_not_clustered else clustered_linear
        return None

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) x as `block` takes it: in blocks for projections in CUDA."""
        return in_blocks(x) if self.in_cuda(len(x)) else x

    def block(
        self, x: torch.Tensor, block: Block, batch: DecodeBatch, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        """A layer call: x, as `laid_out` has it, to the same, with the cache of its KV slot."""
        attention, mlp = block.self_attn, block.mlp
        tokens = x.shape[-2]
        project = self.in_cuda(tokens)
        if project:
            copies = copies_for(tokens)
            gqkv = project(x, attention.gqkv_proj.weight, norm_eps=self.eps)
            out = self.attention(gqkv, k_cache, v_cache, batch, copies=copies)
            x = project(out, attention.o_proj.weight, residual=x, copies=copies)
            act = project(x, mlp.gate_up_proj.weight, norm_eps=self.eps, swiglu=True, copies=copies)
            return project(act, mlp.down_proj.weight, residual=x, copies=copies)
        if tokens <= MAX_TOKENS:
            gqkv = small_linear(x, attention.gqkv_proj.weight, norm_eps=self.eps)
            out = self.attention(gqkv, k_cache, v_cache, batch)
            x = small_linear(out, attention.o_proj.weight, residual=x)
            act = small_linear(x, mlp.gate_up_proj.weight, norm_eps=self.eps, swiglu=True)
            return small_linear(act, mlp.down_proj.weight, residual=x)
        if tokens <= MAX_TILED_TOKENS:
            tiled = self.project
            gqkv, _ = tiled(x, attention.gqkv_proj.weight)
            out = self.attention(gqkv, k_cache, v_cache, batch, x=x, eps=self.eps)
            x, squares = tiled(out, attention.o_proj.weight, residual=x)
            act, _ = tiled(x, mlp.gate_up_proj.weight, squares=squares, eps=self.eps, swiglu=True)
            return tiled(act, mlp.down_proj.weight, residual=x)[0]
        gqkv = linear(x, attention.gqkv_proj.weight)
        out = self.attention(gqkv, k_cache, v_cache, batch, x=x, eps=self.eps)
        x = torch.addmm(x, out, attention.o_proj.weight.t())
        act = scaled_swiglu(linear(x, mlp.gate_up_proj.weight), x, self.eps)
        return torch.addmm(x, act, mlp.down_proj.weight.t())


def weight_shapes(shape: HrmTextShape) -> dict[str, tuple[int, int]]:
    """(rows, width) of each projection of a layer."""
    width = shape.num_heads * shape.head_dim
    return {
        "gqkv_proj": (4 * width, shape.hidden_size),
        "o_proj": (shape.hidden_size, width),
        "gate_up_proj": (2 * shape.intermediate_size, shape.hidden_size),
        "down_proj": (shape.hidden_size, shape.intermediate_size),
    }


def why_not(body: HrmTextBody, dtype: torch.dtype) -> str | None:
    """Why a body with activations of `dtype` cannot run on the fused kernels; None when it can."""
    shape = body.shape
    if len(body.stage) != len(body.steps):
        return "pipeline parallelism"
    if shape.head_dim & (shape.head_dim - 1):
        return f"head_dim={shape.head_dim} is not a power of two"
    shapes = weight_shapes(shape)
    for name, module in body.named_modules():
        whole = shapes.get(name.rpartition(".")[2])
        if whole is None:
            continue
        weight = getattr(module, "weight", None)
        if hasattr(module, "base_layer") or weight is None:
            return f"{name} is quantised, or wrapped as LoRA wraps it"
        # float16 has no room for a product whose norm factor is still to come.
        if weight.dtype != dtype or dtype not in (torch.bfloat16, torch.float32):
            return f"{name} is {weight.dtype} in a model of {dtype}; bfloat16 and float32 are supported"
        if weight.shape != whole:
            return f"{name} is split by tensor parallelism"
        if not weight.is_contiguous() or not fits(*whole):
            return f"{name} has the shape {whole}"
    return None
