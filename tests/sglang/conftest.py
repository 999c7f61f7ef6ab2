"""The SGLang suite runs in SGLang's own environment and is left out of any other."""

import importlib.util

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed in this environment", allow_module_level=True)
