"""A decode step's recurrence on the fused kernels: five a layer, beyond 128 tokens two and four GEMMs.

Where they run, projections are CUDA kernels: up to 8 tokens those whose weights wait in shared memory, up to 128 those
by which weights stream; and so is attention up to 128. Else Triton's.

`FusedDecode` reads the weights of an `hrm_text.model.HrmTextBody`, so what it computes is that module's own function.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.functional import linear

from hrm_text.config import HrmTextShape
from hrm_text.kernels import attention_hopper, staged, streamed
from hrm_text.kernels.attention import DecodeAttention, DecodeBatch
from hrm_text.kernels.first import first
from hrm_text.kernels.gemm import MAX_TOKENS as MAX_TILED_TOKENS
from hrm_text.kernels.gemm import Projections
from hrm_text.kernels.linear import MAX_TOKENS, fits, small_linear
from hrm_text.kernels.pointwise import norm_add
from hrm_text.kernels.staged import COPIES, copies_for, staged_linear
from hrm_text.kernels.streamed import streamed_linear
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
# x as a layer's kernels take it, in rows or in blocks, and (tokens, any) sums of squares of it where they take those.
Activations = tuple[torch.Tensor, torch.Tensor | None]


class FusedDecode:
    """Runs a body's recurrence for one new token a request.

    Args:
        body: with its weights loaded, all of the stages its own.
        device: where they are.

    Attributes:
        why_not_staged: why no projection runs on `staged_linear`; None where those of its `MAX_TOKENS` do.
        why_not_streamed: the same of `streamed_linear`, for more tokens than that.
    """

    def __init__(self, body: HrmTextBody, device: torch.device) -> None:
        self.body = body
        shape = body.shape
        self.eps = shape.rms_norm_eps
        self.attention = DecodeAttention(shape.num_heads, shape.head_dim, device)
        dtype, (kinds, copied) = next(body.parameters()).dtype, kinds_of(shape)
        self.project = Projections(list(weight_shapes(shape).values()), dtype, device)
        with ThreadPoolExecutor(2) as pool:  # all compile
            attention_off = pool.submit(attention_hopper.why_not, shape.head_dim, dtype, device)
            streamed_off = pool.submit(streamed.why_not, kinds, dtype, device)
            self.why_not_staged = staged.why_not(copied, dtype, device)
            self.why_not_streamed = self.why_not_staged or streamed_off.result()
            self.attention.why_not_cuda = attention_off.result()
        if self.why_not_staged is None:
            self.attention.shares = staged.MAX_TOKENS if self.why_not_streamed else streamed.MAX_TOKENS

    def __call__(self, input_ids: torch.Tensor, batch: DecodeBatch, caches: KVCaches) -> torch.Tensor:
        """z_H after every step, (tokens, hidden).

        Args:
            input_ids: (tokens,) integer.
            batch: of these tokens.
            caches: (k_cache, v_cache) of a KV slot, as `DecodeAttention` takes them.
        """
        body = self.body
        z_H, x = self.begin(input_ids)
        z_L = z_H  # the first step is L's, and what z_L was is in x
        for step in body.stage:
            kind = body.steps[step]
            stack = body.L_module if kind == "L" else body.H_module
            for index, block in enumerate(stack.layers):
                x = self.block(x, block, batch, *caches(body.shape.plan.slot(step, index)))
            if kind == "L":
                z_L, x = self.between_stacks(x, z_H)
            else:
                z_H, x = self.between_stacks(x, z_L)
        return z_H

    def staged(self, tokens: int) -> bool:
        """Whether `staged_linear` runs the projections of so many tokens."""
        return tokens <= staged.MAX_TOKENS and not self.why_not_staged

    def tiled(self, tokens: int) -> Callable[..., Activations] | None:
        """What runs them of more, with sums of squares for the norms, if anything does: CUDA's or Triton's."""
        if staged.MAX_TOKENS < tokens <= streamed.MAX_TOKENS and not self.why_not_streamed:
            return streamed_linear
        return self.project if MAX_TOKENS < tokens <= MAX_TILED_TOKENS else None

    def begin(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Activations]:
        """z_H before the first step, (tokens, hidden), and its sum with z_L, of (tokens,) ids."""
        tokens = len(input_ids)
        z_H, x, squares = first(self.body, input_ids, self.staged(tokens), self.tiled(tokens) is not None)
        return z_H, (x, squares)

    def between_stacks(self, x: Activations, other: torch.Tensor) -> tuple[torch.Tensor, Activations]:
        """The RMSNorm of x, (tokens, hidden); and its sum with (tokens, hidden) `other`, for the next stack.

        One kernel, launched as the others are, so that its neighbour's weights are on their way.
        """
        squares = None if x[1] is None else x[1].new_empty(len(other), 1)
        normed, behind = norm_add(x[0], other, self.eps, squares)
        return normed, (behind, squares)

    def block(
        self, activations: Activations, block: Block, batch: DecodeBatch, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> Activations:
        """A layer call: x, as `begin` has it, to the same, with the cache of its KV slot."""
        attention, mlp = block.self_attn, block.mlp
        x, squares = activations
        tokens, eps = x.shape[-2], self.eps
        if self.staged(tokens):
            copies = copies_for(tokens)
            gqkv = staged_linear(x, attention.gqkv_proj.weight, norm_eps=eps)
            out = self.attention(gqkv, k_cache, v_cache, batch, copies=copies)
            x = staged_linear(out, attention.o_proj.weight, residual=x, copies=copies)
            act = staged_linear(x, mlp.gate_up_proj.weight, norm_eps=eps, swiglu=True, copies=copies)
            return staged_linear(act, mlp.down_proj.weight, residual=x, copies=copies), None
        project = self.tiled(tokens)
        if project:
            gqkv, _ = project(x, attention.gqkv_proj.weight, squares=squares, eps=eps)
            out = self.attention(gqkv, k_cache, v_cache, batch)
            x, squares = project(out, attention.o_proj.weight, residual=x)
            act, _ = project(x, mlp.gate_up_proj.weight, squares=squares, eps=eps, swiglu=True)
            return project(act, mlp.down_proj.weight, residual=x)
        if tokens <= MAX_TOKENS:
            gqkv = small_linear(x, attention.gqkv_proj.weight, norm_eps=eps)
            out = self.attention(gqkv, k_cache, v_cache, batch)
            x = small_linear(out, attention.o_proj.weight, residual=x)
            act = small_linear(x, mlp.gate_up_proj.weight, norm_eps=eps, swiglu=True)
            return small_linear(act, mlp.down_proj.weight, residual=x), None
        gqkv = linear(x, attention.gqkv_proj.weight)
        out = self.attention(gqkv, k_cache, v_cache, batch, x=x, eps=eps)
        x = torch.addmm(x, out, attention.o_proj.weight.t())
        act = scaled_swiglu(linear(x, mlp.gate_up_proj.weight), x, eps)
        return torch.addmm(x, act, mlp.down_proj.weight.t()), None


def weight_shapes(shape: HrmTextShape) -> dict[str, tuple[int, int]]:
    """(rows, width) of each projection of a layer."""
    width = shape.num_heads * shape.head_dim
    return {
        "gqkv_proj": (4 * width, shape.hidden_size),
        "o_proj": (shape.hidden_size, width),
        "gate_up_proj": (2 * shape.intermediate_size, shape.hidden_size),
        "down_proj": (shape.hidden_size, shape.intermediate_size),
    }


def kinds_of(
    shape: HrmTextShape,
) -> tuple[list[tuple[int, int, bool, bool, bool]], list[tuple[int, int, bool, bool, bool, int]]]:
    """What `streamed.why_not` and `staged.why_not` take of a model's projections."""
    shapes = weight_shapes(shape)
    kinds = {name: (*shapes[name], *around) for name, around in AROUND.items()}
    # Attention reads rows of gqkv, a head's columns in one program.
    copied = [(*kinds[name], copies) for name in kinds for copies in ((0,) if name == "gqkv_proj" else (1, COPIES))]
    return list(kinds.values()), copied


def why_not(body: HrmTextBody, dtype: torch.dtype) -> str | None:
    """Why a body with activations of `dtype` cannot run on the fused kernels; None when it can."""
    shape = body.shape
    if len(body.stage) != len(body.steps):
        return "pipeline parallelism"
    if shape.head_dim & (shape.head_dim - 1):
        return f"head_dim={shape.head_dim} is not a power of two"
    embedding = body.embed_tokens.weight
    if embedding.dtype != dtype or not embedding.is_contiguous():
        return f"embed_tokens is {embedding.dtype} in a model of {dtype}"
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
