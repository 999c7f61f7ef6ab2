"""`hrm-text doctor` for vLLM."""

import logging
import os
from typing import Any

from hrm_text.config import ConfigError, HrmTextShape, read_config
from hrm_text.doctor import DoctorError, Finding, model_findings, require_entry_point
from hrm_text.names import resolve_model


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

    hooks = all_hooks()
    for hook in hooks:
        if not hook.holds():
            raise DoctorError(f"hook '{hook.name}' did not take hold in vLLM {vllm.__version__}")
    return [
        Finding("engine", f"vLLM {vllm.__version__}"),
        Finding("hooks that hold", ", ".join(dict.fromkeys(hook.name for hook in hooks))),
        *_platform_findings(model),
    ]


def _platform_findings(model: str) -> list[Finding]:
    import torch
    from vllm.platforms import current_platform

    shape, dtype = _read(model)
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        backend = "CPU_ATTN"
        free = _cpu_cache_bytes()
    else:
        backend = "FLASH_ATTN" if dtype != torch.float32 else "TRITON_ATTN"
        available, total = torch.cuda.mem_get_info()
        free = int(available - 0.08 * total)
    return [
        Finding("model", f"{model} ({resolve_model(model)})" if resolve_model(model) != model else model),
        Finding("attention backend", backend),
        *model_findings(shape, str(dtype).removeprefix("torch."), dtype.itemsize, free),
    ]


def _read(model: str) -> tuple[HrmTextShape, Any]:
    """Shape and torch dtype of a checkpoint."""
    import torch
    from transformers import PretrainedConfig

    try:
        raw, _ = PretrainedConfig.get_config_dict(resolve_model(model))
        if not raw:
            raise DoctorError(f"model {model!r}: no config.json there")
        if raw.get("model_type") != "hrm_text":
            raise DoctorError(f"model {model!r} is of type {raw.get('model_type')!r}, not hrm_text")
        shape = read_config(raw)
    except (OSError, ConfigError, ValueError) as error:
        raise DoctorError(f"model {model!r} cannot be served: {error}") from error
    return shape, getattr(torch, raw.get("dtype") or raw.get("torch_dtype") or "float32")


def _cpu_cache_bytes() -> int:
    """KV cache of a CPU server: what the environment says, else half of the memory that is free."""
    gib = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    return int(gib) << 30 if gib else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2
