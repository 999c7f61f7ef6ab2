"""Installing a hook, and knowing that it took hold."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARK = "_hrm_vllm_hook"


class HookError(RuntimeError):
    """A hook did not take hold; vLLM would serve HRM-Text wrongly, so start-up stops."""

    def __init__(self, hook: str, reason: str) -> None:
        import vllm

        super().__init__(
            f"hrm_vllm: hook '{hook}' did not take hold in vLLM {vllm.__version__}: {reason}. "
            "Supported are vLLM 0.32 and 0.33; HRM-Text is not served without this hook"
        )


@dataclass(frozen=True)
class Hook:
    """One attachment to the engine.

    Attributes:
        name: as reported by `hrm-text doctor`.
        install: attaches; calling it again does nothing.
        holds: whether the attachment is in place now.
    """

    name: str
    install: Callable[[], None]
    holds: Callable[[], bool]


def expect(name: str, file: str, passage: str, times: int = 1) -> Hook:
    """A hook that configuration attaches later, and that rests on what `file` of vLLM's says.

    The source is read, not imported: a runner's modules have no business in every process.

    Args:
        name: as reported.
        file: path below the `vllm` package.
        passage: what it must contain, `times` times.
    """

    def holds() -> bool:
        import vllm

        source = Path(vllm.__file__).parent / file
        return source.is_file() and source.read_text().count(passage) == times

    return Hook(name, lambda: None, holds)


def wrap(name: str, target: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Hook:
    """A hook that replaces the function at `target` ("module:attribute.path") by `make(original)`."""
    module_name, _, path = target.partition(":")
    *owners, attribute = path.split(".")

    def owner() -> Any:
        try:
            return functools.reduce(getattr, owners, importlib.import_module(module_name))
        except (ImportError, AttributeError) as error:
            raise HookError(name, f"{target} does not exist ({error})") from error

    def install() -> None:
        holder = owner()
        original = getattr(holder, attribute, None)
        if original is None:
            raise HookError(name, f"{target} does not exist")
        if getattr(original, _MARK, None) == name:
            return
        replacement = functools.wraps(original)(make(original))
        setattr(replacement, _MARK, name)
        setattr(holder, attribute, replacement)

    def holds() -> bool:
        return getattr(getattr(owner(), attribute, None), _MARK, None) == name

    return Hook(name, install, holds)
