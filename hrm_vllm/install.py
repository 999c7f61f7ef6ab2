"""The table of hooks, in the order they are installed."""

from vllm.logger import init_logger
from vllm.platforms import current_platform

from hrm_text.hooks import install_all
from hrm_vllm import ARCHITECTURE, compat
from hrm_vllm.config import HrmTextConfigHook
from hrm_vllm.hooks import Hook, HookError, expect, wrap

logger = init_logger("vllm.hrm_vllm")

MODEL = "hrm_vllm.model:HrmTextForCausalLM"
RENDERER_MODE = "hrm_text"


def _model_class() -> Hook:
    from vllm import ModelRegistry

    try:
        from hrm_vllm.model_info import InspectedHere
    except ImportError as error:
        raise HookError("model class", str(error)) from error
    entry = InspectedHere(*MODEL.split(":"))

    def install() -> None:
        ModelRegistry.models[ARCHITECTURE] = entry

    return Hook("model class", install, lambda: ModelRegistry.models.get(ARCHITECTURE) == entry)


def _model_config() -> Hook:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    def install() -> None:
        MODELS_CONFIG_MAP[ARCHITECTURE] = HrmTextConfigHook

    return Hook("model config", install, lambda: MODELS_CONFIG_MAP.get(ARCHITECTURE) is HrmTextConfigHook)


def _chat_renderer() -> Hook:
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    renderer = ("hrm_vllm.chat", "HrmTextRenderer")

    def install() -> None:
        if RENDERER_MODE not in RENDERER_REGISTRY.renderers:
            RENDERER_REGISTRY.register(RENDERER_MODE, *renderer)
            TokenizerRegistry.register(RENDERER_MODE, *TokenizerRegistry.tokenizers["hf"])

    return Hook("chat renderer", install, lambda: RENDERER_REGISTRY.renderers.get(RENDERER_MODE) == renderer)


def all_hooks() -> list[Hook]:
    """Every hook this plugin needs."""
    from hrm_vllm import logprobs, lora, model_names, prefix_cache, requests, runner_v1

    return [
        _model_class(),
        _model_config(),
        _chat_renderer(),
        # Our renderer's, which let no limit cut a chat.
        expect("whole chats", "renderers/online_renderer.py", "await renderer.render_chat_async("),
        expect("whole chats", "entrypoints/common/offline.py", "= renderer.render_chat("),
        wrap("model names", "vllm.engine.arg_utils:EngineArgs.create_engine_config", model_names.resolving),
        wrap("model names offline", "vllm.engine.arg_utils:get_model_path", model_names.keeping_names),
        wrap(
            "tokenizer names",
            "vllm.tokenizers.registry:cached_resolve_tokenizer_args",
            model_names.resolving_path,
        ),
        wrap("config names", "transformers:AutoConfig.from_pretrained", model_names.resolving_path),
        wrap("request spans", "vllm.v1.engine.input_processor:InputProcessor.process_inputs", requests.with_spans),
        *(
            wrap("options among fields", f"vllm.entrypoints.openai.{body}.to_sampling_params", requests.with_fields)
            for body in (
                "completion.protocol:CompletionRequest",
                "chat_completion.protocol:ChatCompletionRequest",
                "responses.protocol:ResponsesRequest",
            )
        ),
        wrap(
            "no beam search",
            "vllm.v1.engine.input_processor:InputProcessor.resolve_watermarking",
            requests.refusing_beams,
        ),
        wrap("LoRA adapters", "vllm.v1.engine.llm_engine:LLMEngine.add_lora", lora.checking),
        wrap(
            "LoRA adapters",
            "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
            lora.refusing,
        ),
        wrap(
            "prefix cache keys",
            "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
            prefix_cache.with_span_keys,
        ),
        # Has it by name, imported before plugins are loaded: its KV events would leave the spans out.
        wrap(
            "prefix cache keys",
            "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
            prefix_cache.with_span_keys,
        ),
        wrap(
            "prompt logprobs",
            "vllm.v1.engine.logprobs:LogprobsProcessor.from_new_request",
            logprobs.hiding_in_span_scores,
        ),
        wrap(
            "prompt logprobs of completions",
            "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion._create_completion_logprobs",
            logprobs.with_one_decoding,
        ),
        wrap(
            "model runner V1",
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
            runner_v1.with_step_spans,
        ),
        expect("model runner V2", "v1/worker/gpu/model_states/__init__.py", "return model.get_model_state_cls()"),
        expect(
            "model runner V2 metadata",
            "v1/worker/gpu/attn_utils.py",
            "model_specific_attn_metadata.get_extra_attn_kwargs(",
        ),
        expect(
            "graphs of steps with prompts",
            "v1/worker/gpu/model_runner.py",
            "self.model_state.capture_inner_cudagraphs(",
        ),
        # Behind the last attention of a step, only these states are computed, and all of a scored prompt's.
        expect(
            "states that are read",
            "v1/worker/gpu/model_runner.py",
            "sample_hidden_states = hidden_states[input_batch.logits_indices]",
            times=2,
        ),
        # A compiled stack runs at other steps by what it finds here under its layers' names.
        expect(
            "one compilation for every step",
            "model_executor/layers/attention/attention.py",
            "= forward_context.no_compile_layers[layer_name]",
        ),
        expect(
            "FA3's schedule of a split batch", "v1/attention/backends/flash_attn.py", "def _get_scheduler_metadata("
        ),
        # Read when the first batch is split, which no dry run is.
        expect(
            "prompts' own keys",
            "v1/attention/backends/flash_attn.py",
            "self.kv_cache_dtype = kv_cache_spec.dtype",
        ),
        # Called in both scheduling loops.
        expect("span-aligned scheduler", "v1/core/sched/scheduler.py", "self._reserve_prefill_lookahead(", times=2),
        *(_lora_on_a_cpu() if current_platform.is_cpu() else []),
    ]


def _lora_on_a_cpu() -> list[Hook]:
    from hrm_vllm.lora import sparing_the_base_model

    # Prompts' products call the first, decode's the second, which is the same by another name.
    return [
        wrap("LoRA on a CPU", f"vllm.lora.{module}:bgmv_shrink", sparing_the_base_model)
        for module in ("ops.torch_ops.lora_ops", "punica_wrapper.punica_cpu")
    ]


def install() -> None:
    """Install and check every hook; harmless when done before.

    Raises:
        HookError: vLLM's version is not supported, or a hook did not take hold.
    """
    compat.check_version()
    install_all(all_hooks(), HookError)
    logger.debug("hrm_vllm: all hooks hold")
