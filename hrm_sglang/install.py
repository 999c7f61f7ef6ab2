"""The table of hooks, in the order they are installed."""

import logging
from collections.abc import Callable
from typing import Any

from hrm_sglang import ARCHITECTURE, compat, config, model_names
from hrm_sglang.attention_backends import SUPPORTED_BACKENDS, with_spans
from hrm_sglang.config import CACHE
from hrm_sglang.hooks import Hook, HookError, expect, wrap
from hrm_text.hooks import install_all

logger = logging.getLogger("sglang.srt.hrm_sglang")


def _model_class() -> Hook:
    from sglang.srt.models.registry import ModelRegistry

    from hrm_sglang.model import HrmTextForCausalLM

    def install() -> None:
        ModelRegistry.models[ARCHITECTURE] = HrmTextForCausalLM

    return Hook("model class", install, lambda: ModelRegistry.models.get(ARCHITECTURE) is HrmTextForCausalLM)


def _resolution(name: str, step: str, resolving: Callable[[Any, Callable[[Any], None]], None]) -> Hook:
    from sglang.srt.arg_groups import resolution_hooks

    def holds() -> bool:
        return resolving in resolution_hooks._HOOKS.get(step, ())

    def install() -> None:
        if not holds():
            resolution_hooks.register_resolution_hook(step)(resolving)

    return Hook(name, install, holds)


def _radix_cache() -> Hook:
    from sglang.srt.mem_cache.registry import get_radix_cache_factory, register_radix_cache_backend

    from hrm_sglang.prefix_cache import make_cache

    def install() -> None:
        if get_radix_cache_factory(CACHE) is None:
            register_radix_cache_backend(CACHE, make_cache)

    return Hook("radix cache", install, lambda: get_radix_cache_factory(CACHE) is make_cache)


def all_hooks() -> list[Hook]:
    """Every hook this plugin needs."""
    from hrm_sglang import chat, logprobs, lora, requests, scheduler, spans

    return [
        _model_class(),
        _resolution("configuration", config.STEP, config.resolving),
        _resolution("model names", model_names.STEP, model_names.resolving),
        # The built-in step must still hang on what the hook hides from it.
        expect("configuration", "srt/arg_groups/model_hook.py", 'getattr(hf_config, "prefix_lm", True)'),
        _radix_cache(),
        *(
            expect("radix cache keys", "srt/mem_cache/unified_radix_cache.py", f"    def {method}(")
            for method in compat.keyed_methods()
        ),
        # Where the chunk hooks lend the adder an aligned number of tokens.
        expect("memory budget", "srt/managers/schedule_policy.py", compat.clipping_passage()),
        expect(
            "backend by name",
            "srt/model_executor/model_runner_components/attention_backend_setup.py",
            "ATTENTION_BACKENDS[backend_str](model_runner)",
        ),
        # The methods that our backends take the place of.
        expect("torch attention", "srt/layers/attention/torch_native_backend.py", "self._run_sdpa_forward_extend("),
        expect(
            "triton attention",
            "srt/layers/attention/triton_backend.py",
            "self.extend_attention_fwd = torch.compiler.disable(extend_attention_fwd)",
        ),
        # What graphs of steps with prompts call, and how they know when to be captured.
        expect(
            "prompts' own keys",
            "srt/layers/attention/flashattention_backend.py",
            "self.flash_attn_varlen_func = flash_attn_varlen_func",
        ),
        expect("graphs of steps with prompts", "srt/model_executor/runner/__init__.py", "    get_is_capture_mode,"),
        # Behind the last attention of a step, only these states are computed.
        expect(
            "states that are read",
            "srt/layers/logits_processor.py",
            "last_index = torch.cumsum(logits_metadata.extend_seq_lens, dim=0) - 1",
        ),
        *(
            wrap(
                f"attention backend {name}",
                f"sglang.srt.layers.attention.attention_registry:ATTENTION_BACKENDS.{name}",
                with_spans(name),
            )
            for name in SUPPORTED_BACKENDS
        ),
        wrap(
            "request spans",
            "sglang.srt.managers.tokenizer_manager:TokenizerManager._create_tokenized_object",
            requests.with_spans,
        ),
        wrap(
            "options among fields",
            "sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
            requests.with_fields,
        ),
        wrap(
            "chat",
            "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._process_messages",
            chat.encoding,
        ),
        wrap("requests by id", "sglang.srt.managers.schedule_batch:Req.__init__", spans.registering),
        wrap(
            "first chunks",
            "sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
            scheduler.admitting,
        ),
        wrap(
            "further chunks",
            "sglang.srt.managers.schedule_policy:PrefillAdder.add_chunked_req",
            scheduler.continuing,
        ),
        *(
            wrap(
                f"input log-probs {method}",
                "sglang.srt.managers.scheduler_components.logprob_result_processor:"
                f"SchedulerLogprobResultProcessor.{method}",
                logprobs.hiding(lists),
            )
            for method, lists in logprobs.FILLED.items()
        ),
        wrap("LoRA layer numbers", "sglang.srt.lora.lora_manager:get_layer_id", lora.numbering),
        wrap("LoRA checks", "sglang.srt.lora.lora_manager:LoRAManager.validate_new_adapter", lora.checking),
        wrap("LoRA tensors", "sglang.srt.lora.lora:LoRAAdapter._process_weight", lora.reading),
        wrap("LoRA stacking", "sglang.srt.lora.lora:LoRAAdapter._normalize_weights", lora.stacking),
    ]


def install() -> None:
    """Install and check every hook; harmless when done before.

    Raises:
        HookError: SGLang's version is not supported, or a hook did not take hold.
    """
    compat.check_version()
    install_all(all_hooks(), HookError)
    logger.debug("hrm_sglang: all hooks hold")
