"""`hrm-text-nano` and `hrm-text-1b` as model names, wherever vLLM takes one."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from hrm_text.names import resolve_model
from hrm_vllm.spans import require_rule

# Whether the user chose max_num_batched_tokens; the config hook may raise only a default.
budget_is_explicit: ContextVar[bool] = ContextVar("budget_is_explicit", default=True)


def resolving(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `EngineArgs.create_engine_config`, the point that both `vllm serve` and `LLM` pass.

    Seen in vLLM 0.32.0; plugins are loaded before it in either.
    """

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        resolved = resolve_model(self.model)
        if resolved != self.model:
            # Clients keep using the name that the user typed.
            self.served_model_name = self.served_model_name or [self.model]
            self.model = resolved
        if self.tokenizer is not None:
            self.tokenizer = resolve_model(self.tokenizer)
        token = budget_is_explicit.set(self.max_num_batched_tokens is not None)
        try:
            config = original(self, *args, **kwargs)
        finally:
            budget_is_explicit.reset(token)
        require_rule(config.model_config)
        return config

    return create_engine_config


def resolving_path(original: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that take a model's name or path first of all.

    lm-eval's backend, like other programs around `LLM`, asks transformers for the configuration and vLLM for the
    tokenizer by the name it was given.
    """

    def resolved(model: Any, *args: Any, **kwargs: Any) -> Any:
        return original(resolve_model(model) if isinstance(model, str) else model, *args, **kwargs)

    return resolved


def keeping_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `arg_utils.get_model_path`, with which `EngineArgs` looks for a model when HF_HUB_OFFLINE=1.

    Our names stay until `create_engine_config`: a path in their place would become the name that clients have to use.
    """

    def get_model_path(model: Any, *args: Any, **kwargs: Any) -> Any:
        known = isinstance(model, str) and resolve_model(model) != model
        return model if known else original(model, *args, **kwargs)

    return get_model_path
