"""The kernels of `staged.cu`, `streamed.cu` and `attention.cu` compiled for the CPU, on `fibers.h`."""

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrm_text.kernels import attention_hopper, staged, streamed
from hrm_text.kernels.nvrtc import source

ENTRY = """
extern "C" int params_bytes() { return sizeof(Params); }
extern "C" int shared_bytes() { return SHARED_NEEDED; }
static std::vector<Written> inputs_of(const Params* params) { return {INPUTS}; }
extern "C" int inputs(const Params* params, Written* inputs) {
  int count = 0;
  for (const Written& each : inputs_of(params)) inputs[count++] = each;
  return count;
}
extern "C" long run(Params* params, int ctas, const Written* inputs, int count, unsigned seed) {
  return run_fibers(NAME, *params, ctas, std::vector<Written>(inputs, inputs + count), seed);
}
extern "C" const char* fault_of_the_run() { return fault; }
extern "C" const void* fetches() { return fetched.data(); }
extern "C" long fetch_count() { return fetched.size(); }
"""
FOLDER = tempfile.TemporaryDirectory(prefix="emulated")
Edit = Callable[[str], str]
Geometry = staged.Geometry | streamed.Geometry | attention_hopper.Tile
MAX_INPUTS = 3


@dataclass(frozen=True)
class Emulation:
    """What sets the emulation of a kernel apart.

    Attributes:
        headers: for a CPU.
        files: of the kernel.
        name: of its function.
        shared_needed: bytes of shared memory, in C++.
        inputs: in C++, of what the kernel before writes its place in `params`, a null pointer, and its bytes.
    """

    headers: tuple[str, ...]
    files: tuple[str, ...]
    name: str
    shared_needed: str
    inputs: str

    def source(self, edit: Edit) -> str:
        folder = Path(__file__).parent
        headers = "".join((folder / name).read_text() for name in self.headers)
        names = {"NAME": self.name, "SHARED_NEEDED": self.shared_needed, "INPUTS": self.inputs}
        defined = "".join(f"#define {name} {value}\n" for name, value in names.items())
        return headers + edit(source(*self.files)) + "\n" + defined + ENTRY


RESIDUAL = "{(char*)params->residual, nullptr, params->residual ? 2ull * params->tokens * OUTPUTS : 0}"
STAGED = Emulation(
    ("fibers.h", "emulated.h"),
    staged.SOURCES[1:],
    "staged",
    "SLOTS * (SLOT + 16) + 4 * MAX_TOKENS * WARPS",
    "{(char*)params->x, nullptr, (params->apart ? X_COPIES : 1) * 2ull * params->tokens * K}, " + RESIDUAL,
)
STREAMED = Emulation(
    ("fibers.h", "emulated.h", "emulated_streams.h"),
    streamed.SOURCES[2:],
    "streamed",
    "(char*)(Shared(nullptr).sent + CONSUMERS) - (char*)nullptr",
    "{(char*)params->x.address, nullptr, 2ull * params->tokens * K}, "
    "{(char*)params->squares, nullptr, 4ull * params->tokens * params->parts}, " + RESIDUAL,
)
ATTENTION = Emulation(
    ("fibers.h", "emulated.h", "emulated_streams.h", "emulated_attention.h"),
    attention_hopper.SOURCES[3:],
    "attention",
    "(char*)(Shared(nullptr).sent + 1) - (char*)nullptr",
    "{(char*)params->gqkv, nullptr, 8ull * params->tokens * params->heads * DIM}",
)


class Written(ctypes.Structure):
    """What the kernel before is to write."""

    _fields_ = [("to", ctypes.c_void_p), ("values", ctypes.c_void_p), ("bytes", ctypes.c_uint64)]


def library(geometry: Geometry, edit: Edit) -> ctypes.CDLL:
    """The kernel for `geometry`, its source changed by `edit`."""
    if isinstance(geometry, streamed.Geometry):
        emulation, warps, cluster = STREAMED, geometry.launched_warps, geometry.tile.splits
    elif isinstance(geometry, attention_hopper.Tile):
        emulation, warps, cluster = ATTENTION, geometry.warps, geometry.splits
    else:
        emulation, warps, cluster = STAGED, geometry.threads // 32, 1
    text = emulation.source(edit)
    name = hashlib.sha256((text + str(geometry)).encode()).hexdigest()[:16]
    path = Path(FOLDER.name) / f"{name}.so"
    if not path.exists():
        flags = ["-x", "c++", "-std=c++17", "-O2", "-w", "-fno-strict-aliasing", "-shared", "-fPIC"]
        sizes = {"SHARED_BYTES": geometry.shared_bytes, "ALL_WARPS": warps, "CLUSTER": cluster}
        macros = [*geometry.macros, *(f"-D{name}={size}" for name, size in sizes.items())]
        command = ["g++", *flags, *macros, "-o", str(path), "-"]
        run = subprocess.run(command, input=text, text=True, stderr=subprocess.PIPE)
        assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(path))


class Emulated:
    """A kernel for `staged_linear`, `streamed_linear` or `paged_attention` on the CPU.

    Attributes:
        early_writes: to y before the kernel before had ended, in the last launch.
        fetched: what was copied into shared memory in the last launch; rows of (address, bytes).
    """

    def __init__(self, geometry: Geometry, seed: int = 0, edit: Edit = lambda text: text) -> None:
        self.code, self.seed = library(geometry, edit), seed
        self.code.fault_of_the_run.restype = ctypes.c_char_p
        self.code.fetches.restype = ctypes.c_void_p
        for function in (self.code.fetch_count, self.code.run):
            function.restype = ctypes.c_long
        pointer = ctypes.c_void_p
        self.code.run.argtypes = [pointer, ctypes.c_int, pointer, ctypes.c_int, ctypes.c_uint]
        self.geometry, self.early_writes = geometry, 0
        self.fetched = np.empty((0, 2), dtype=np.uint64)

    def __call__(self, params: ctypes.Structure, clusters: int | None = None) -> None:
        """Run it: attention for so many clusters and an idle one."""
        assert ctypes.sizeof(params) == self.code.params_bytes()
        assert self.code.shared_bytes() <= self.geometry.shared_bytes
        self.seed += 1
        given = ctypes.byref(params)
        # The kernel before writes them while this one runs: until then the kernel's own hold NaN.
        inputs = (Written * MAX_INPUTS)()
        count = self.code.inputs(given, inputs)
        there = [each for each in inputs[:count] if each.bytes]
        saved = [ctypes.create_string_buffer(ctypes.string_at(each.to, each.bytes), each.bytes) for each in there]
        for each, values in zip(there, saved, strict=True):
            each.values = ctypes.addressof(values)
        if isinstance(self.geometry, attention_hopper.Tile):
            assert clusters is not None
            ctas = (clusters + 1) * self.geometry.splits
        else:
            ctas = self.geometry.ctas
        self.early_writes = self.code.run(given, ctas, inputs, count, self.seed)
        for each in there:  # a broken kernel may have ended before
            ctypes.memmove(each.to, each.values, each.bytes)
        fault = self.code.fault_of_the_run()
        if fault:
            raise RuntimeError(f"emulation: {fault.decode()}")
        count = self.code.fetch_count()
        if not count:
            self.fetched = self.fetched[:0]
            return
        array = (ctypes.c_uint64 * (2 * count)).from_address(self.code.fetches())
        self.fetched = np.array(array, dtype=np.uint64).reshape(count, 2)

    def tensor_map(self, address: int, rows: int, columns: int, fetched: int) -> "ctypes.Array[ctypes.c_uint64]":
        """As `streamed.Kernel` has it, for `emulated_streams.h`."""
        return streamed.TensorMap(address, rows, columns, fetched)
