"""The layers that the model is built of, where SGLang's own have a limit."""

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.layernorm import RMSNorm

from hrm_sglang.layers import in_any_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_runs_in_pytorch(dtype: torch.dtype) -> None:
    """SGLang's CUDA kernel of the norm refuses float32, so an engine with dtype float32 did not start on a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        norm = RMSNorm(8, eps=1e-6, has_weight=False)
        norm._forward_method = norm.forward_cuda  # what it is on a GPU
        assert in_any_dtype(norm)._forward_method == (
            norm.forward_native if dtype == torch.float32 else norm.forward_cuda
        )
    finally:
        torch.set_default_dtype(before)
