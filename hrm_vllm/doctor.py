"""`hrm-text doctor` for vLLM."""

import logging
import os

from hrm_text.doctor import (
    DoctorError,
    Finding,
    check_hooks,
    half_of_free_memory,
    model_findings,
    named,
    read_model,
    require_entry_point,
)


def diagnose(model: str) -> list[Finding]:
    """Load vLLM as a server would, check every hook, and describe `model`.

    Raises:
        DoctorError: the plugin would not be active, or the model cannot be served.
    """
    logging.getLogger("vllm").setLevel(logging.ERROR)
    require_entry_point("vllm.general_plugins", "hrm_text", "hrm_vllm:register")
    import vllm
    import vllm.envs
    from vllm.plugins import load_general_plugins

    from hrm_vllm.hooks import HookError

    allowed = vllm.envs.VLLM_PLUGINS
    if allowed is not None and "hrm_text" not in allowed:
        raise DoctorError(f"VLLM_PLUGINS={','.join(allowed)!r} does not name hrm_text, so vLLM leaves it out")
    try:
        load_general_plugins()
    except HookError as error:
        raise DoctorError(str(error)) from error
    from hrm_vllm.install import all_hooks

    engine = f"vLLM {vllm.__version__}"
    return [
        Finding("engine", engine),
        check_hooks(all_hooks(), engine),
        *_platform_findings(model),
    ]


def _platform_findings(model: str) -> list[Finding]:
    import torch
    from vllm.platforms import current_platform

    shape, dtype = read_model(model)
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        backend = "CPU_ATTN"
        free = _cpu_cache_bytes()
    else:
        backend = "FLASH_ATTN" if dtype != torch.float32 else "TRITON_ATTN"
        available, total = torch.cuda.mem_get_info()
        free = int(available - 0.08 * total)
    return [
        named(model),
        Finding("attention backend", backend),
        *model_findings(shape, str(dtype).removeprefix("torch."), dtype.itemsize, free),
    ]


def _cpu_cache_bytes() -> int:
    """KV cache of a CPU server: what the environment says, else an expectation."""
    gib = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    return int(gib) << 30 if gib else half_of_free_memory()
