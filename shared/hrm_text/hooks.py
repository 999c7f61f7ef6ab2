"""Attaching to an engine, and knowing that it took hold: what the adapters' hooks have in common."""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARK = "_hrm_text_hook"
Make = Callable[[Callable[..., Any]], Callable[..., Any]]


class HookError(RuntimeError):
    """A hook did not take hold; the engine would serve HRM-Text wrongly, so start-up stops."""

    def __init__(self, plugin: str, engine: str, supported: str, hook: str, reason: str) -> None:
        super().__init__(
            f"{plugin}: hook '{hook}' did not take hold in {engine}: {reason}. "
            f"Supported are {supported}; HRM-Text is not served without this hook"
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


def expect_in(folder: Callable[[], Path], name: str, file: str, passage: str, times: int = 1) -> Hook:
    """A hook that configuration attaches later, and that rests on what `file` of the engine says.

    The source is read, not imported: a runner's modules have no business in every process.

    Args:
        folder: the engine's package folder.
        name: as reported.
        file: path below it.
        passage: what it must contain, `times` times.
    """

    def holds() -> bool:
        source = folder() / file
        return source.is_file() and source.read_text().count(passage) == times

    return Hook(name, lambda: None, holds)


def wrap_at(fault: Callable[[str, str], HookError], name: str, target: str, make: Make) -> Hook:
    """A hook that replaces the function at `target` by `make(original)`.

    Args:
        fault: the adapter's error for (hook, reason).
        name: as reported.
        target: "module:attribute.path"; the last part may also be a key of a dictionary.
        make: gives the replacement.
    """
    module_name, _, path = target.partition(":")
    *owners, attribute = path.split(".")

    def owner() -> Any:
        try:
            return functools.reduce(getattr, owners, importlib.import_module(module_name))
        except (ImportError, AttributeError) as error:
            raise fault(name, f"{target} does not exist ({error})") from error

    def current() -> Any:
        holder = owner()
        return holder.get(attribute) if isinstance(holder, dict) else getattr(holder, attribute, None)

    def install() -> None:
        original = current()
        if original is None:
            raise fault(name, f"{target} does not exist")
        if getattr(original, _MARK, None) == name:
            return
        replacement = functools.wraps(original)(make(original))
        setattr(replacement, _MARK, name)
        holder = owner()
        if isinstance(holder, dict):
            holder[attribute] = replacement
        else:
            setattr(holder, attribute, replacement)

    def holds() -> bool:
        return getattr(current(), _MARK, None) == name

    return Hook(name, install, holds)


def install_all(hooks: Sequence[Hook], fault: Callable[[str, str], BaseException]) -> None:
    """Install every hook and check it.

    Raises:
        whatever `fault(hook, reason)` makes, when one does not hold after that.
    """
    for hook in hooks:
        hook.install()
        if not hook.holds():
            raise fault(hook.name, "what it rests on is not there")
