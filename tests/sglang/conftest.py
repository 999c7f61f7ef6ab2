"""The SGLang suite runs in SGLang's own environment and is left out of any other."""

import importlib.util

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("sglang") is None else []
