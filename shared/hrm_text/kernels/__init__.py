"""Fused decode kernels for both engines, in Triton; `decode.py` puts them together."""
