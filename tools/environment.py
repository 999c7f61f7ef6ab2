"""A virtual environment that is made in steps: it survives being interrupted, and says when it is ready."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


class SetupError(Exception):
    """A reason, in words for the user, why set-up cannot go on."""


class Unavailable(SetupError):
    """Nothing failed: what was asked for does not exist for this machine."""


@dataclass(frozen=True)
class Step:
    name: str
    says: str
    key: str  # hash of all that the step depends on: under another key it has to run again
    run: Callable[[], None]


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def is_whole(dist_info: Path) -> bool:
    """Whether pip finished: it writes INSTALLER after the files, and RECORD has their sizes.

    Not those of compiled files, though some wheels ship them: Python rewrites these.
    """
    try:
        with (dist_info / "RECORD").open(newline="") as record:
            rows = [(row[0], int(row[2])) for row in csv.reader(record) if row[2] and row[0][-4:] != ".pyc"]
        return (dist_info / "INSTALLER").exists() and all(
            os.stat(dist_info.parent / name).st_size == size for name, size in rows
        )
    except (OSError, IndexError, ValueError):
        return False


class Environment:
    """The environment in `folder`; beside it lie the log of what was done to it and a lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder.with_name(folder.name + "-setup.log")
        self.lock = folder.with_name(folder.name + ".lock")
        self.state = folder / "setup-steps.json"
        self.inherited: tuple[int, ...] = ()

    def done(self) -> dict[str, str]:
        """Keys of the finished steps; none of them counts when the interpreter is gone."""
        try:
            return dict(json.loads(self.state.read_text())) if self.python.exists() else {}
        except (OSError, ValueError):
            return {}

    def record(self, done: dict[str, str]) -> None:
        draft = self.state.with_suffix(".tmp")
        draft.write_text(json.dumps(done, indent=1))
        draft.replace(self.state)

    def is_ready(self, steps: Sequence[Step]) -> bool:
        done = self.done()
        return all(done.get(step.name) == step.key for step in steps)

    def run_steps(self, steps: Sequence[Step]) -> None:
        """Run what is not done yet and everything after it; after damage, all but the first step."""
        done = self.done()
        for name in self.drop_half_installed() if done else ():
            print(f"set-up: {name} was left half-installed and is installed again", flush=True)
            done = {step.name: done[step.name] for step in steps[:1] if step.name in done}
        kept = 0
        while kept < len(steps) and done.get(steps[kept].name) == steps[kept].key:
            kept += 1
        done = {step.name: step.key for step in steps[:kept]}
        if kept:
            self.record(done)
        for step in steps[kept:]:
            print(f"set-up: {step.says} ...", flush=True)
            began = time.monotonic()
            step.run()
            done[step.name] = step.key
            self.record(done)
            print(f"set-up: done in {time.monotonic() - began:.0f} s", flush=True)

    def distributions(self, name: str = "*") -> list[Path]:
        return sorted(self.folder.glob(f"lib/python3*/site-packages/{name}.dist-info"))

    def drop_half_installed(self) -> list[str]:
        """Remove the records of what a killed pip left incomplete: pip would call it installed."""
        broken = [info for info in self.distributions() if not is_whole(info)]
        for info in broken:
            shutil.rmtree(info)
        return [info.name.removesuffix(".dist-info") for info in broken]

    def acquire(self) -> None:
        """Wait for other set-ups. pip inherits the lock: one that outlives its killed parent counts too."""
        import fcntl  # not at the top: Windows gets as far as being told what is supported

        self.lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: waiting for another set-up of this environment to end ...", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        self.inherited = (descriptor,)

    def call(self, what: str, *command: str | Path) -> None:
        """Run a command with its output in the log, and fail with the end of that."""
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            log.flush()
            status = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=self.inherited
            ).returncode
        if status:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise SetupError(f"{what} failed; the end of {self.log}:\n\n{tail}\n")

    def make(self) -> None:
        if importlib.util.find_spec("ensurepip") is None:
            package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
            raise SetupError(
                f"this Python cannot make virtual environments. On Debian or Ubuntu: apt install {package}"
            )
        self.state.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        self.call("making the environment", sys.executable, "-m", "venv", self.folder)

    def pip(self, *arguments: str) -> None:
        # -I: neither PYTHONPATH nor the user's own packages may stand in for what is asked.
        options = ("--no-input", "--disable-pip-version-check")
        self.call("pip", self.python, "-I", "-m", "pip", arguments[0], *options, *arguments[1:])

    def versions(self, package: str) -> str:
        """What pip prints of the versions it finds, configured as it is on this machine."""
        command = (self.python, "-I", "-m", "pip", "index", "versions", package)
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
