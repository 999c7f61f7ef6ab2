"""Modules whose every attribute is a placeholder, for packages that SGLang imports on a CPU and never calls."""

import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class Missing:
    """A name that may be imported and must not be used."""

    def __init__(self, name: str = "") -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.name}: a stub of the CPU tests was called")

    def __getattr__(self, name: str) -> "Missing":
        return Missing(name)


def submodules(package: str, *names: str) -> None:
    """Register `package.name` for each name, with every attribute a `Missing`."""
    for name in names:
        module = ModuleType(f"{package}.{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
        module.__path__ = []
        module.__getattr__ = Missing  # type: ignore[method-assign]
        sys.modules[module.__name__] = module
        parent, _, leaf = module.__name__.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], leaf, module)
