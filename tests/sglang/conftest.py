"""The SGLang suite runs in SGLang's own environment and is left out of any other."""

import importlib.util
import os

import torch

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available():
    from tests.sglang.engine import cpu_environment

    # For the tests that import SGLang into this process; `engine` has put the stand-ins on the path.
    os.environ.update({key: value for key, value in cpu_environment().items() if key != "PYTHONPATH"})
