"""Triton kernels of a start on Hopper, compiled from the moment that its configuration is known.

`recorded_kernels.txt` has those of `vllm serve` with the 1B and every default: vLLM's sampler and input kernels, which
its warm-up would compile one after the other (8 s), and ours. `python -m benchmarks.startup --record FILE` writes one.
"""

import multiprocessing
import os
from pathlib import Path

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger

from hrm_text.kernels.recorded import compile_in_processes, read

logger = init_logger("vllm.hrm_vllm")

RECORD = Path(__file__).parent / "recorded_kernels.txt"
MOST_PROCESSES = 8


def begin_compiling(config: VllmConfig) -> None:
    """Compile the recorded kernels in the background, where vLLM forks as well and its warm-up would compile them.

    A start does without where there can be no such processes: in a daemonic one, and where CUDA is there already.

    Args:
        config: of an engine whose steps will all run on the fused kernels.
    """
    processes = min(MOST_PROCESSES, (os.cpu_count() or 1) // 2)
    forks = envs.VLLM_WORKER_MULTIPROC_METHOD == "fork" and not multiprocessing.current_process().daemon
    if not forks or torch.cuda.is_initialized() or not config.kernel_config.enable_jit_warmup:
        return
    try:
        compile_in_processes(read(RECORD), processes)
    except OSError as error:
        logger.debug("HRM-Text: no kernels are compiled ahead: %r", error)
