"""Stands in for sgl_kernel, SGLang's CUDA kernels, of which a CPU run with the Triton or torch backend calls none."""

from stub import Missing, submodules

__version__ = "0.0.0"
__getattr__ = Missing
submodules(__name__, "kvcacheio", "utils")
