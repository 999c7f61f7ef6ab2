"""Plain torch layers for `hrm_text.model`, with no engine: what the kernels are tested and timed with."""

import torch
from torch import nn

from hrm_text.config import HrmTextShape


class PlainLinear(nn.Module):
    """A projection in the form that engines have it: a weight, and (output, bias) back."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class PlainNorm(nn.Module):
    """RMSNorm without a weight."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class PlainLayers:
    """`hrm_text.model.EngineLayers` without attention: only the fused kernels run such a body."""

    tp_size = 1

    def column_linear(self, in_features: int, out_features: list[int], prefix: str) -> nn.Module:
        return PlainLinear(in_features, sum(out_features))

    def row_linear(self, in_features: int, out_features: int, prefix: str) -> nn.Module:
        return PlainLinear(in_features, out_features)

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        return nn.Embedding(vocab_size, hidden_size)

    def rms_norm(self, hidden_size: int, eps: float) -> nn.Module:
        return PlainNorm(eps)

    def rope(self, shape: HrmTextShape) -> nn.Module:
        return nn.Identity()

    def swiglu(self) -> nn.Module:
        return nn.Identity()

    def attention(self, num_heads: int, head_dim: int, slot: int, prefix: str) -> nn.Module:
        return nn.Identity()


def rope_table(shape: HrmTextShape) -> torch.Tensor:
    """(max_positions, head_dim) float32, [cos | sin], as both engines keep it."""
    dims = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(shape.max_positions, dtype=torch.float32)[:, None] * shape.rope_theta**-dims
    return torch.cat([angles.cos(), angles.sin()], -1)
