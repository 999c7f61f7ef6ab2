"""`hrm-text doctor` for SGLang."""

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

    engine = f"SGLang {__version__}"
    return [
        Finding("engine", engine),
        check_hooks(all_hooks(), engine),
        *_model_findings(model),
    ]


def _model_findings(model: str) -> list[Finding]:
    import torch

    shape, dtype = read_model(model)
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else half_of_free_memory()
    return [
        named(model),
        Finding("attention backend", "triton" if on_gpu else "torch_native"),
        *model_findings(shape, str(dtype).removeprefix("torch."), dtype.itemsize, free),
    ]
