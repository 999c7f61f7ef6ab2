"""The kernel of `staged.cu` compiled for the CPU, on `emulated.h`."""

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hrm_text.kernels.nvrtc import source
from hrm_text.kernels.staged import COPIES, SOURCES, Geometry, Params

ENTRY = """
extern "C" int params_bytes() { return sizeof(Params); }
extern "C" int shared_bytes() { return SLOTS * (SLOT + 16) + 4 * MAX_TOKENS * WARPS; }
extern "C" long run(Params* params, const char* x, const char* residual, unsigned seed) {
  const u64 tokens = params->tokens, outputs = residual ? OUTPUTS : 0;
  return run_fibers(staged, *params, CTAS, {(char*)params->x, x, (params->apart ? X_COPIES : 1) * tokens * K * 2},
                    {(char*)params->residual, residual, tokens * outputs * 2}, seed);
}
extern "C" const char* fault_of_the_run() { return fault; }
extern "C" const void* fetches() { return fetched.data(); }
extern "C" long fetch_count() { return fetched.size(); }
"""
FOLDER = tempfile.TemporaryDirectory(prefix="emulated")
Edit = Callable[[str], str]


def library(geometry: Geometry, edit: Edit) -> ctypes.CDLL:
    """The kernel for `geometry`, its source changed by `edit`."""
    header = (Path(__file__).parent / "emulated.h").read_text()
    text = header + edit(source(*SOURCES[1:])) + ENTRY
    name = hashlib.sha256((text + str(geometry)).encode()).hexdigest()[:16]
    path = Path(FOLDER.name) / f"{name}.so"
    if not path.exists():
        flags = ["-x", "c++", "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-shared", "-fPIC"]
        macros = [*geometry.macros, f"-DSHARED_BYTES={geometry.shared_bytes}"]
        subprocess.run(["g++", *flags, *macros, "-o", str(path), "-"], input=text, text=True, check=True)
    return ctypes.CDLL(str(path))


class Emulated:
    """A kernel for `staged_linear` on the CPU.

    Attributes:
        early_writes: to y before the kernel before had ended, in the last launch.
        fetched: what the producers copied in the last launch; rows of (address, bytes).
    """

    def __init__(self, geometry: Geometry, seed: int = 0, edit: Edit = lambda text: text) -> None:
        self.code, self.seed = library(geometry, edit), seed
        self.code.fault_of_the_run.restype = ctypes.c_char_p
        self.code.fetches.restype = ctypes.c_void_p
        self.code.fetch_count.restype = self.code.run.restype = ctypes.c_long
        self.code.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
        self.geometry, self.early_writes = geometry, 0
        self.fetched = np.empty((0, 2), dtype=np.uint64)

    def __call__(self, params: Params) -> None:
        assert ctypes.sizeof(params) == self.code.params_bytes()
        assert self.geometry.shared_bytes == self.code.shared_bytes()
        self.seed += 1
        shape = self.geometry
        outputs = shape.rows // 2 if shape.swiglu else shape.rows
        x = torch.empty(COPIES if params.apart else 1, params.tokens, shape.width, dtype=torch.bfloat16)
        residual = torch.empty(params.tokens, outputs, dtype=torch.bfloat16)
        # The kernel before writes them while this one runs: until then the kernel's own hold NaN.
        ctypes.memmove(x.data_ptr(), params.x, x.nbytes)
        if params.residual:
            ctypes.memmove(residual.data_ptr(), params.residual, residual.nbytes)
        late = residual.data_ptr() if params.residual else None
        self.early_writes = self.code.run(ctypes.byref(params), x.data_ptr(), late, self.seed)
        ctypes.memmove(params.x, x.data_ptr(), x.nbytes)  # a broken kernel may have ended before
        if late:
            ctypes.memmove(params.residual, late, residual.nbytes)
        fault = self.code.fault_of_the_run()
        if fault:
            raise RuntimeError(f"emulation: {fault.decode()}")
        count = self.code.fetch_count()
        array = (ctypes.c_uint64 * (2 * count)).from_address(self.code.fetches())
        self.fetched = np.array(array, dtype=np.uint64).reshape(count, 2)
