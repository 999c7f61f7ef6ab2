"""CUDA kernels compiled at run time by NVRTC, and their launch."""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from hrm_text.kernels.launch import capability

FOLDER = Path(__file__).parent
ALL_SHARED = 100  # per cent of a multiprocessor's L1 that is shared memory
Argument = TypeVar("Argument")
Result = TypeVar("Result")


def once(function: Callable[[Argument], Result]) -> Callable[[Argument], Result]:
    """`functools.cache`, of which a second caller waits for the first one's result."""
    results: dict[Argument, Future[Result]] = {}
    lock = threading.Lock()

    @functools.wraps(function)
    def call(argument: Argument) -> Result:
        with lock:
            first = argument not in results
            result = results.setdefault(argument, Future())
        if first:
            try:
                result.set_result(function(argument))
            except BaseException as error:
                result.set_exception(error)
        return result.result()

    return call


def source(*names: str) -> str:
    """Source files as one; what they need of the GPU comes first."""
    return "\n".join((FOLDER / name).read_text() for name in names)


def compile_for_hopper(text: str, name: str, macros: tuple[str, ...] = ()) -> bytes:
    """The machine code of a kernel's source.

    Raises:
        ImportError: no `cuda.bindings`.
        RuntimeError: no NVRTC, or it refuses the source; the message is its log.
    """
    from cuda.bindings import nvrtc

    def checked(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC: {result[0].name}")
        return result[1] if len(result) > 1 else None

    options = [option.encode() for option in ("--gpu-architecture=sm_90a", "--std=c++17", *macros)]
    program = checked(nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []))
    if nvrtc.nvrtcCompileProgram(program, len(options), options)[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC: {log.decode(errors='replace').rstrip(chr(0))}")
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def why_not_loaded(
    kinds: Sequence[tuple[Any, ...]],
    fits: Callable[..., bool],
    kernel_for: Callable[..., object],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Why kernels for weights cannot run; None when they can. Compiles and loads them.

    Args:
        kinds: of each what it is compiled for, rows and width of its weight first.
        fits: whether there is a kernel of a kind.
        kernel_for: makes one, of a kind and the index of a GPU.
        dtype: of weights and activations.
        device: where they are.
    """
    if dtype != torch.bfloat16:
        return f"{dtype} is not bfloat16"
    if capability(device) != 9:
        return "the device is not of the Hopper generation"
    for kind in kinds:
        if not fits(*kind):
            return f"a weight has the shape {kind[:2]}"
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
        with ThreadPoolExecutor(len(kinds)) as pool:  # side by side, for a compilation takes a second
            list(pool.map(lambda kind: kernel_for(*kind, index), kinds))
    except Exception as error:  # the bindings raise what they like when a library is not there
        return f"they do not compile: {error}"
    return None


def checked_cuda(result: tuple[Any, ...]) -> Any:
    """What a call of the driver's bindings returns behind its error.

    Raises:
        RuntimeError: there is one.
    """
    if result[0].value:
        raise RuntimeError(f"CUDA: {result[0].name}")
    return result[1] if len(result) > 1 else None


def carve_out(function: Any) -> None:
    """Has a function run where all of L1 is shared memory: a multiprocessor must be empty to change the division,
    so kernels that are to run on it together want the same one."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    checked_cuda(driver.cuFuncSetAttribute(driver.CUfunction(int(function)), attribute, ALL_SHARED))


class DependentKernel:
    """A kernel on the current device, launched on the current stream while the kernel before it runs; CUDA graphs can
    capture it.

    Args:
        code: as `compile_for_hopper` returns it; the module is loaded for as long as the process runs.
        name: of the kernel, which takes one structure by value.
        ctas, threads: its launch; CTAs where a call does not say.
        shared_bytes: of dynamic shared memory.
        cluster: CTAs of a cluster.
        dependent: whether it may start early; for measurements.

    Raises:
        RuntimeError: the driver refuses it, or nowhere on the device is there room for a cluster (a slice of a GPU).
    """

    def __init__(
        self,
        code: bytes,
        name: str,
        ctas: int,
        threads: int,
        shared_bytes: int,
        *,
        cluster: int = 1,
        dependent: bool = True,
    ) -> None:
        from cuda.bindings import driver

        self.driver, self.lock = driver, threading.Lock()
        torch.zeros(1, device="cuda")  # binds the device's context to this thread
        self.module = checked_cuda(driver.cuModuleLoadData(code))
        self.function = checked_cuda(driver.cuModuleGetFunction(self.module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked_cuda(driver.cuFuncSetAttribute(self.function, limit, shared_bytes))
        carve_out(self.function)
        early, together = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        together.value.clusterDim.x, together.value.clusterDim.y, together.value.clusterDim.z = cluster, 1, 1
        self.config = config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = ctas, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.attrs = [early] * dependent + [together] * (cluster > 1)
        config.numAttrs = len(config.attrs)
        if cluster > 1 and checked_cuda(driver.cuOccupancyMaxActiveClusters(self.function, config)) < 1:
            raise RuntimeError(f"{cluster} CTAs of {shared_bytes} bytes of shared memory each find no room together")

    def __call__(self, params: ctypes.Structure, ctas: int | None = None) -> None:
        """Launch it.

        Args:
            params: the structure.
            ctas: where it is another number each time.
        """
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        with self.lock:  # `ahead.py` launches from several threads
            if ctas is not None:
                self.config.gridDimX = ctas
            self.config.hStream = self.driver.CUstream(torch.cuda.current_stream().cuda_stream)
            checked_cuda(self.driver.cuLaunchKernelEx(self.config, self.function, ctypes.addressof(arguments), 0))
