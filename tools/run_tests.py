#!/usr/bin/env python3
"""Run the tests, each engine's in its own environment: the engines pin different releases of torch.

Arguments go to pytest. Paths among them choose the suites; an expression may select nothing in one of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from environment import SetupError, Unavailable
from setup_env import ROOT, has_nvidia_gpu, prepare

NOTHING_SELECTED = 5  # pytest's exit codes
FAILED = 1
SGLANG_TESTS = ROOT / "tests/sglang"
# What follows these is no path, whatever it looks like.
TAKE_A_VALUE = ("-k", "-m", "-n", "-p", "-c", "-o", "-W", "--deselect", "--ignore", "--junitxml", "--dist")
# Most tests are one core's work, and those of a file share engines. On a GPU two would share its memory.
TWO_AT_A_TIME = ("-n", "2", "--dist", "loadfile")


def for_vllm(path: Path) -> Path | None:
    """Where the vLLM suite, which has the core's tests too, looks when `path` is asked for."""
    return None if path.is_relative_to(SGLANG_TESTS) else path


def for_sglang(path: Path) -> Path | None:
    """Where the SGLang suite looks when `path` is asked for."""
    if path.is_relative_to(SGLANG_TESTS):
        return path
    return SGLANG_TESTS if SGLANG_TESTS.is_relative_to(path) else None


# Environment of tools/setup_env.py, and its share of a path. SGLang's runs on a CPU everywhere.
SUITES: dict[str, Callable[[Path], Path | None]] = {"vllm": for_vllm, "sglang-cpu": for_sglang}


def arguments_of(share: Callable[[Path], Path | None], words: Sequence[str]) -> list[str] | None:
    """pytest's arguments for one suite; None when `words` name paths, and none of this suite's."""
    arguments: list[str] = []
    named, own = False, False
    for before, word in zip(["", *words], words, strict=False):
        file, colons, test = word.partition("::")
        path = (ROOT / file).resolve()
        if word.startswith("-") or before in TAKE_A_VALUE or not path.exists():
            arguments.append(word)
            continue
        named = True
        if (mine := share(path)) is not None:
            own = True
            arguments.append(f"{mine}{colons}{test}")
    if named:
        return arguments if own else None
    return [*arguments, str(share(ROOT / "tests"))]


def verdict(statuses: Mapping[str, int]) -> int:
    """One exit code for all suites: a suite in which nothing was selected counts when no other ran."""
    failed = [status for status in statuses.values() if status not in (0, NOTHING_SELECTED)]
    if failed:
        return failed[0]
    return 0 if 0 in statuses.values() else NOTHING_SELECTED


def run(words: Sequence[str]) -> int:
    """Set up and run every suite that `words` ask for."""
    chosen = {suite: arguments_of(share, words) for suite, share in SUITES.items()}
    pythons: dict[str, Path] = {}
    said: dict[str, str] = {}
    for suite, arguments in chosen.items():
        if arguments is None:
            continue
        try:
            pythons[suite] = prepare(suite, dev=True).python
        except Unavailable as reason:
            said[suite] = f"LEFT OUT: {reason}"
    statuses: dict[str, int] = {}
    options, environment = ((), {}) if has_nvidia_gpu() else (TWO_AT_A_TIME, {"OMP_NUM_THREADS": "1"})
    for suite, python in pythons.items():
        print(f"tests: {suite}", flush=True)
        command = [str(python), "-m", "pytest", *options, *(chosen[suite] or ())]
        status = statuses[suite] = subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode
        said[suite] = {0: "passed", NOTHING_SELECTED: "nothing selected"}.get(status, f"pytest ended with {status}")
        if status not in (0, FAILED, NOTHING_SELECTED):
            break  # interrupted, or arguments that pytest does not take
    for suite, word in said.items():
        print(f"tests: {suite}: {word}", flush=True)
    return verdict(statuses)


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(sys.argv[1:])
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntests: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
