"""Triton kernels that a start will ask for, known from one that was recorded, compiled ahead by processes of their own.

An engine's start compiles some fifty kernels, most of them one after the other. Each needs Python's lock for a third of
its time, so threads do not help much; forked processes do, and what they leave in Triton's cache on disk is what the
engine looks for there. A record that no longer fits costs nothing but their time: then the engine compiles, as ever.
"""

import ast
import importlib
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

HOPPER = 90
PATIENCE = 120  # seconds, after which a process is ended that a lock, held when it was forked, keeps from working
TYPE = re.compile(r"\*?(?:[iu]|fp|bf)\d+")
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Recorded:
    """A Triton kernel as it was once asked for.

    Attributes:
        kernel: `module:function`.
        options: `name=value` of those that are not Triton's own, such as num_warps.
        arguments: of each its type, or the constant that it was, in Python; with ":16" where the compiler knew it
            divisible by 16, with ":" where it looked and knew nothing.
    """

    kernel: str
    options: tuple[str, ...]
    arguments: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> "Recorded":
        """Of what `str` says.

        Raises:
            ValueError: it does not.
        """
        head, bar, arguments = line.partition(" | ")
        kernel, *options = head.split() or [""]
        if not bar or ":" not in kernel or not all("=" in option for option in options):
            raise ValueError(f"not a recorded kernel: {line!r}")
        return cls(kernel, tuple(options), tuple(arguments.split()))

    @classmethod
    def of(cls, module: str, name: str, specialization: str) -> "Recorded":
        """From what Triton passes to `knobs.runtime.jit_post_compile_hook`.

        Args:
            specialization: its `specialization_data`.
        """
        from triton.backends.nvidia.compiler import CUDAOptions

        said = json.loads(specialization)
        constants, attributes = (
            {key[0]: value for key, value in zip(said[f"{what}_keys"], said[f"{what}_vals"], strict=True)}
            for what in ("constant", "attrs")
        )
        arguments = []
        for place, kind in enumerate(said["signature"].values()):
            looked = attributes.get(place)
            suffix = "" if looked is None else ":16" if looked == ALIGNED else ":"
            arguments.append((repr(constants[place]) if kind == "constexpr" else kind) + suffix)
        options = [
            f"{option}={said['options'][option]!r}"
            for option in ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl")
            if said["options"][option] != getattr(CUDAOptions, option)
        ]
        return cls(f"{module}:{name}", tuple(options), tuple(arguments))

    def __str__(self) -> str:
        return f"{' '.join((self.kernel, *self.options))} | {' '.join(self.arguments)}"

    def compile(self) -> Any:
        """Compile it for Hopper into Triton's cache, without a GPU; returns Triton's `CompiledKernel`.

        Raises:
            Exception: the kernel is not there, or takes other arguments.
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        module, _, name = self.kernel.partition(":")
        function = getattr(importlib.import_module(module), name)
        signature, constants, attributes = {}, {}, {}
        for place, (argument, said) in enumerate(zip(function.arg_names, self.arguments, strict=True)):
            what, looked, divisible = said.partition(":")
            signature[argument] = what if TYPE.fullmatch(what) else "constexpr"
            if not TYPE.fullmatch(what):
                constants[(place,)] = constant(what)
            if looked:
                attributes[(place,)] = ALIGNED if divisible else []
        options = {name: constant(value) for name, _, value in (option.partition("=") for option in self.options)}
        source = ASTSource(function, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)

    def compile_launcher(self) -> None:
        """`compile`, and what launches it, for which Triton up to 3.6 asks the C compiler."""
        compiled = self.compile()
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        CudaUtils()
        CudaLauncher(compiled.src, compiled.metadata)


def constant(text: str) -> Any:
    """A constant as `repr` wrote it: infinities and NaN too, and Triton's types, of which Triton says the names."""
    import triton.language as tl

    try:
        value = ast.literal_eval(text)
    except ValueError:
        return float(text)
    return tl.dtype(value) if isinstance(value, str) and tl.dtype.is_dtype(value) else value


def read(path: Path) -> list[Recorded]:
    """The kernels of a file, a line each; lines that begin with # say something to people."""
    lines = path.read_text().splitlines()
    return [Recorded.parse(line) for line in lines if line and not line.startswith("#")]


def record(path: Path) -> None:
    """Have each kernel that Triton compiles from here on, also in processes forked behind, added to a file, behind the
    seconds that it took."""
    from triton import knobs

    last = threading.local()

    def remember(*, times: Any, **_: Any) -> None:
        last.seconds = times.total / 1e6

    def write(*, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        with path.open("a") as file:
            file.write(f"{last.seconds:.3f} {Recorded.of(fn.module, fn.name, compile['specialization_data'])}\n")

    knobs.compilation.listener, knobs.runtime.jit_post_compile_hook = remember, write


def in_order(recorded: str) -> list[Recorded]:
    """The kernels of what `record` wrote, each once, those that take longest first."""
    seconds: dict[Recorded, float] = {}
    for line in recorded.splitlines():
        took, _, said = line.partition(" ")
        kernel = Recorded.parse(said)
        seconds[kernel] = max(float(took), seconds.get(kernel, 0.0))
    return sorted(seconds, key=lambda kernel: -seconds[kernel])


def compile_in_processes(kernels: Sequence[Recorded], processes: int) -> list[Any]:
    """Have them compiled in so many forked processes, the first ones first; at once, the processes go on.

    The caller must not have initialised CUDA, as for any fork, nor be daemonic. What fails is left to the engine.

    Returns:
        The processes, which end by themselves.

    Raises:
        OSError: the system has no room for one more.
    """
    context = multiprocessing.get_context("fork")
    shares = [kernels[first::processes] for first in range(processes)]
    started = [context.Process(target=_compile_all, args=(share,), daemon=True) for share in shares if share]
    for process in started:
        process.start()
    return started


def _compile_all(kernels: Sequence[Recorded]) -> None:
    for number in (signal.SIGALRM, signal.SIGTERM):  # whatever the engine's process makes of them
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(PATIENCE)
    with suppress(OSError):
        os.nice(1)  # behind the engine's own work
    for kernel in kernels:
        try:
            kernel.compile_launcher()
        except Exception as error:  # whatever a record that no longer fits leads to
            logger.debug("HRM-Text: %s is left to the engine: %r", kernel.kernel, error)
