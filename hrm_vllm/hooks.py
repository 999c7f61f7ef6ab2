"""Installing a hook into vLLM, and knowing that it took hold."""

from pathlib import Path

from hrm_text import hooks
from hrm_text.hooks import Hook, Make

__all__ = ["Hook", "HookError", "expect", "wrap"]


class HookError(hooks.HookError):
    """A hook did not take hold; vLLM would serve HRM-Text wrongly, so start-up stops."""

    def __init__(self, hook: str, reason: str) -> None:
        import vllm

        super().__init__("hrm_vllm", f"vLLM {vllm.__version__}", "vLLM 0.32 and 0.33", hook, reason)


def _package() -> Path:
    import vllm

    return Path(vllm.__file__).parent


def expect(name: str, file: str, passage: str, times: int = 1) -> Hook:
    """A hook that rests on what `file` of vLLM's says; see `hrm_text.hooks.expect_in`."""
    return hooks.expect_in(_package, name, file, passage, times)


def wrap(name: str, target: str, make: Make) -> Hook:
    """A hook that replaces the function at `target`; see `hrm_text.hooks.wrap_at`."""
    return hooks.wrap_at(HookError, name, target, make)
