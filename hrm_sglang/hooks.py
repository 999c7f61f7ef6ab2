"""Installing a hook into SGLang, and knowing that it took hold.

SGLang's own `HookRegistry` (0.5.23) logs a hook that fails and goes on; these raise.
"""

from pathlib import Path

from hrm_sglang.compat import SUPPORTED_TEXT
from hrm_text import hooks
from hrm_text.hooks import Hook, Make

__all__ = ["Hook", "HookError", "expect", "wrap"]


class HookError(hooks.HookError):
    """A hook did not take hold; SGLang would serve HRM-Text wrongly, so start-up stops."""

    def __init__(self, hook: str, reason: str) -> None:
        from sglang.version import __version__

        super().__init__("hrm_sglang", f"SGLang {__version__}", SUPPORTED_TEXT, hook, reason)


def _package() -> Path:
    import sglang

    return Path(str(sglang.__file__)).parent


def expect(name: str, file: str, passage: str, times: int = 1) -> Hook:
    """A hook that rests on what `file` of SGLang's says; see `hrm_text.hooks.expect_in`."""
    return hooks.expect_in(_package, name, file, passage, times)


def wrap(name: str, target: str, make: Make) -> Hook:
    """A hook that replaces the function at `target`; see `hrm_text.hooks.wrap_at`."""
    return hooks.wrap_at(HookError, name, target, make)
