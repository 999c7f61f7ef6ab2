"""The kernels of `staged.cu` and `clustered.cu` compiled for the CPU, on `fibers.h`."""

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hrm_text.kernels import clustered, staged
from hrm_text.kernels.nvrtc import source

ENTRY = """
extern "C" int params_bytes() { return sizeof(Params); }
extern "C" int shared_bytes() { return SHARED_NEEDED; }
extern "C" long x_bytes(const Params* params) { return (long)(COPIES_OF_X) * params->tokens * K * 2; }
extern "C" long residual_bytes(const Params* params) { return params->residual ? 2l * params->tokens * OUTPUTS : 0; }
extern "C" long run(Params* params, int ctas, const char* x, const char* residual, unsigned seed) {
  return run_fibers(NAME, *params, ctas, {(char*)params->x, x, (u64)x_bytes(params)},
                    {(char*)params->residual, residual, (u64)residual_bytes(params)}, seed);
}
extern "C" const char* fault_of_the_run() { return fault; }
extern "C" const void* fetches() { return fetched.data(); }
extern "C" long fetch_count() { return fetched.size(); }
"""
FOLDER = tempfile.TemporaryDirectory(prefix="emulated")
Edit = Callable[[str], str]
Geometry = staged.Geometry | clustered.Geometry


@dataclass(frozen=True)
class Emulation:
    """What sets the emulation of a kernel apart.

    Attributes:
        headers: for a CPU.
        files: of the kernel.
        name: of its function.
        shared_needed, copies_of_x: expressions in C++, of shared memory and of what `params` points to.
    """

    headers: tuple[str, ...]
    files: tuple[str, ...]
    name: str
    shared_needed: str
    copies_of_x: str = "1"

    def source(self, edit: Edit) -> str:
        folder = Path(__file__).parent
        headers = "".join((folder / name).read_text() for name in self.headers)
        names = {"NAME": self.name, "SHARED_NEEDED": self.shared_needed, "COPIES_OF_X": self.copies_of_x}
        defined = "".join(f"#define {name} {value}\n" for name, value in names.items())
        return headers + edit(source(*self.files)) + "\n" + defined + ENTRY


STAGED = Emulation(
    ("fibers.h", "emulated.h"),
    staged.SOURCES[1:],
    "staged",
    "SLOTS * (SLOT + 16) + 4 * MAX_TOKENS * WARPS",
    "params->apart ? X_COPIES : 1",
)
CLUSTERED = Emulation(
    ("fibers.h", "emulated.h", "emulated_clusters.h"), clustered.SOURCES[2:], "clustered", "RING + X_BYTES + 3 * 8"
)


def library(geometry: Geometry, edit: Edit) -> ctypes.CDLL:
    """The kernel for `geometry`, its source changed by `edit`."""
    if isinstance(geometry, clustered.Geometry):
        emulation, warps, cluster = CLUSTERED, geometry.warps, geometry.splits
    else:
        emulation, warps, cluster = STAGED, geometry.threads // 32, 1
    text = emulation.source(edit)
    name = hashlib.sha256((text + str(geometry)).encode()).hexdigest()[:16]
    path = Path(FOLDER.name) / f"{name}.so"
    if not path.exists():
        flags = ["-x", "c++", "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-shared", "-fPIC"]
        sizes = {"SHARED_BYTES": geometry.shared_bytes, "ALL_WARPS": warps, "CLUSTER": cluster}
        macros = [*geometry.macros, *(f"-D{name}={size}" for name, size in sizes.items())]
        command = ["g++", *flags, *macros, "-o", str(path), "-"]
        run = subprocess.run(command, input=text, text=True, stderr=subprocess.PIPE)
        assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(path))


class Emulated:
    """A kernel for `staged_linear` or `clustered_linear` on the CPU.

    Attributes:
        early_writes: to y before the kernel before had ended, in the last launch.
        fetched: what was copied into shared memory in the last launch; rows of (address, bytes).
    """

    def __init__(self, geometry: Geometry, seed: int = 0, edit: Edit = lambda text: text) -> None:
        self.code, self.seed = library(geometry, edit), seed
        self.code.fault_of_the_run.restype = ctypes.c_char_p
        self.code.fetches.restype = ctypes.c_void_p
        for function in (self.code.fetch_count, self.code.run, self.code.x_bytes, self.code.residual_bytes):
            function.restype = ctypes.c_long
        pointer = ctypes.c_void_p
        self.code.run.argtypes = [pointer, ctypes.c_int, pointer, pointer, ctypes.c_uint]
        self.geometry, self.early_writes = geometry, 0
        self.fetched = np.empty((0, 2), dtype=np.uint64)

    def __call__(self, params: ctypes.Structure) -> None:
        assert ctypes.sizeof(params) == self.code.params_bytes()
        assert self.code.shared_bytes() <= self.geometry.shared_bytes
        self.seed += 1
        given = ctypes.byref(params)
        # The kernel before writes them while this one runs: until then the kernel's own hold NaN.
        x = torch.empty(self.code.x_bytes(given), dtype=torch.uint8)
        residual = torch.empty(self.code.residual_bytes(given), dtype=torch.uint8)
        late = [(params.x, x), (params.residual, residual)]
        for place, values in late:
            ctypes.memmove(values.data_ptr(), place, values.nbytes)
        self.early_writes = self.code.run(given, self.geometry.ctas, x.data_ptr(), residual.data_ptr(), self.seed)
        for place, values in late:  # a broken kernel may have ended before
            ctypes.memmove(place, values.data_ptr(), values.nbytes)
        fault = self.code.fault_of_the_run()
        if fault:
            raise RuntimeError(f"emulation: {fault.decode()}")
        count = self.code.fetch_count()
        array = (ctypes.c_uint64 * (2 * count)).from_address(self.code.fetches())
        self.fetched = np.array(array, dtype=np.uint64).reshape(count, 2)
