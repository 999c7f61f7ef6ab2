"""Fused decode kernels for both engines, in Triton and CUDA; `decode.py` puts them together."""
