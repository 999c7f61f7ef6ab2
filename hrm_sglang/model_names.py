"""`hrm-text-nano` and `hrm-text-1b` as model names, wherever SGLang takes one."""

from collections.abc import Callable
from typing import Any

from hrm_text.names import resolve_model

STEP = "handle_model_source_paths"


def resolving(server_args: Any, previous: Callable[[Any], None]) -> None:
    """For the resolution step `handle_model_source_paths`, the first that reads the path (SGLang 0.5.23).

    Clients keep using the name that the user typed.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    view = resolving_view(server_args)
    typed = view.model_path
    resolved = resolve_model(typed)
    if resolved != typed:
        # `sglang.launch_server` and `Engine` fill in the tokenizer from the model, before or after this step.
        tokenizer = view.tokenizer_path
        declare_resolution(
            server_args,
            "hrm_text",
            model_path=resolved,
            tokenizer_path=resolve_model(tokenizer) if tokenizer else resolved,
            served_model_name=view.served_model_name or typed,
        )
    previous(server_args)
