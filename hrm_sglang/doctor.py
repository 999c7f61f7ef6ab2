"""`hrm-text doctor` for SGLang."""

import logging
import os
from typing import Any

from hrm_text.config import ConfigError, HrmTextShape, read_config
from hrm_text.doctor import DoctorError, Finding, model_findings, require_entry_point
from hrm_text.names import resolve_model


def diagnose(model: str) -> list[Finding]:
    """Load SGLang as a server would, check every hook, and describe `model`.

    Raises:
        DoctorError: the plugin would not be active, or the model cannot be served.
    """
    logging.disable(logging.WARNING)
    require_entry_point("sglang.srt.plugins", "hrm_text", "hrm_sglang:register")
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and "hrm_text" not in allowed.split(","):
        raise DoctorError(f"SGLANG_PLUGINS={allowed!r} does not name hrm_text, so SGLang leaves it out")
    from sglang.srt.plugins import load_plugins
    from sglang.version import __version__

    try:
        load_plugins()
    except SystemExit as error:
        raise DoctorError(str(error)) from error
    from hrm_sglang.install import all_hooks

    hooks = all_hooks()
    for hook in hooks:
        if not hook.holds():
            raise DoctorError(f"hook '{hook.name}' did not take hold in SGLang {__version__}")
    return [
        Finding("engine", f"SGLang {__version__}"),
        Finding("hooks that hold", ", ".join(hook.name for hook in hooks)),
        *_model_findings(model),
    ]


def _model_findings(model: str) -> list[Finding]:
    import torch

    shape, dtype = _read(model)
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2
    return [
        Finding("model", f"{model} ({resolve_model(model)})" if resolve_model(model) != model else model),
        Finding("attention backend", "triton" if on_gpu else "torch_native"),
        *model_findings(shape, str(dtype).removeprefix("torch."), dtype.itemsize, free),
    ]


def _read(model: str) -> tuple[HrmTextShape, Any]:
    """Shape and torch dtype of a checkpoint."""
    import torch
    from transformers import PretrainedConfig

    try:
        raw, _ = PretrainedConfig.get_config_dict(resolve_model(model))
        if raw.get("model_type") != "hrm_text":
            raise DoctorError(f"model {model!r} is of type {raw.get('model_type')!r}, not hrm_text")
        shape = read_config(raw)
    except (OSError, ConfigError, ValueError) as error:
        raise DoctorError(f"model {model!r} cannot be served: {error}") from error
    return shape, getattr(torch, raw.get("dtype") or raw.get("torch_dtype") or "float32")
