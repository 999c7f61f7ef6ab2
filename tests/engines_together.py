"""Several engines for one test module, started side by side: most of a start is one core's work."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class Engines(Mapping[str, Any]):
    """Engines by name. One that did not start raises where a test asks for it, so that the others are tested.

    Args:
        started: the engines that run.
        failed: what stopped the others.
    """

    def __init__(self, started: Mapping[str, Any], failed: Mapping[str, BaseException]) -> None:
        self._started, self._failed = started, failed

    def __getitem__(self, name: str) -> Any:
        if name in self._failed:
            raise self._failed[name]
        return self._started[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._started, *self._failed])

    def __len__(self) -> int:
        return len(self._started) + len(self._failed)


@contextlib.contextmanager
def together(makers: Mapping[str, Callable[..., Any]], logs: Path, first_alone: bool = False) -> Iterator[Engines]:
    """Start what `makers` make of `log=`, a file in the folder `logs`.

    Args:
        first_alone: the first one compiles what the others find compiled.
    """
    started: dict[str, Any] = {}
    failed: dict[str, BaseException] = {}
    names = list(makers)
    cut = 1 if first_alone else 0
    with contextlib.ExitStack() as stack:
        for group in (names[:cut], names[cut:]):
            processes = {name: makers[name](log=logs / name.replace(" ", "_")) for name in group}
            for process in processes.values():
                stack.push(process)
            for name, process in processes.items():
                try:
                    started[name] = process.__enter__()
                except Exception as error:
                    log = logs / name.replace(" ", "_")
                    error.add_note(f"{name}: {log.read_text()[-3000:] if log.exists() else 'no log'}")
                    failed[name] = error
        yield Engines(started, failed)


def log_of(logs: Path, name: str) -> str:
    """What the engine `name` has logged."""
    return (logs / name.replace(" ", "_")).read_text()
