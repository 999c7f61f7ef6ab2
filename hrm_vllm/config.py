"""Engine configuration for HRM-Text: what vLLM has to be told before it resolves anything."""

import os
from typing import Any

import torch
from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode, ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from hrm_text.config import read_config
from hrm_text.envelope import ChatEncoder
from hrm_text.kernels import launch
from hrm_text.spans import Envelope, SpanRule
from hrm_vllm.attention import SUPPORTED_BACKENDS
from hrm_vllm.decode import why_not_config
from hrm_vllm.kernels_ahead import begin_compiling
from hrm_vllm.model_names import budget_is_explicit
from hrm_vllm.spans import set_rule

logger = init_logger("vllm.hrm_vllm")

SCHEDULER = "hrm_vllm.scheduler.make_scheduler"


class HrmTextConfigHook:
    """Entry of `MODELS_CONFIG_MAP`; vLLM 0.32 calls both methods before it resolves the platform."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse a config that cannot be served, choose our renderer and record the span rule."""
        shape = read_config(_raw_config(model_config))
        if model_config.enable_prompt_embeds:
            raise ValueError("HRM-Text: --enable-prompt-embeds is not supported; spans are found in token ids")
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = "hrm_text"
        envelope = _envelope(model_config)
        if envelope is None:
            logger.warning(
                "HRM-Text without a tokenizer: the envelope's token ids are unknown, so a prompt without "
                "prefix_lm_spans is one bidirectional span as a whole"
            )
        set_rule(model_config, SpanRule(envelope, shape.prefix_lm))

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Scheduler, token budget and attention backend; refuse what would be wrong in silence."""
        _refuse_unsupported(vllm_config)
        scheduler = vllm_config.scheduler_config
        if scheduler.scheduler_cls not in (None, SCHEDULER):
            raise ValueError(
                f"HRM-Text needs its own scheduler to keep prefill chunks at span bounds; "
                f"--scheduler-cls={scheduler.scheduler_cls!r} cannot be used"
            )
        scheduler.scheduler_cls = SCHEDULER
        if scheduler.long_prefill_token_threshold > 0:
            logger.warning(
                "HRM-Text: long_prefill_token_threshold=%d is ignored; a span longer than it would wait for ever",
                scheduler.long_prefill_token_threshold,
            )
            scheduler.long_prefill_token_threshold = 0
        _set_token_budget(vllm_config)
        _set_attention_backend(vllm_config)
        _set_graph_sizes(vllm_config)
        _keep_eager_on_cpu(vllm_config)
        _leave_prefill_to_the_kernels(vllm_config)


def _envelope(model_config: ModelConfig) -> Envelope | None:
    """Ids of the envelope's markers; also for an engine without a tokenizer, whose prompts mean the same."""
    from vllm.tokenizers.registry import cached_get_tokenizer

    try:
        tokenizer = cached_get_tokenizer(
            model_config.tokenizer,
            runner_type=model_config.runner_type,
            tokenizer_mode=model_config.tokenizer_mode,
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
        return ChatEncoder.of(tokenizer).envelope
    except Exception:
        if model_config.skip_tokenizer_init:
            return None
        raise


def _raw_config(model_config: ModelConfig) -> dict[str, Any]:
    """The file's own mapping: transformers would fill a missing field with another model's default."""
    from transformers import PretrainedConfig

    if model_config.hf_overrides:
        return model_config.hf_config.to_dict()
    raw, _ = PretrainedConfig.get_config_dict(
        model_config.hf_config_path or model_config.model, revision=model_config.revision
    )
    return raw


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    if vllm_config.model_config.runner_type != "generate":
        raise ValueError(f"HRM-Text: --runner {vllm_config.model_config.runner_type} is not supported, only generate")
    if envs.VLLM_USE_RUST_FRONTEND:
        raise ValueError("HRM-Text: VLLM_USE_RUST_FRONTEND=1 is not supported: it does not check a request's spans")
    if vllm_config.kv_transfer_config is not None:
        raise ValueError(
            "HRM-Text: KV transfer and offloading (kv_transfer_config, kv_offloading_size) are not supported: "
            "connectors may key cached blocks by token ids alone, which is wrong inside a span"
        )
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise ValueError("HRM-Text: context parallelism is not supported; use tensor or pipeline parallelism")
    if parallel.enable_dbo:
        raise ValueError("HRM-Text: dual-batch overlap (--enable-dbo) is not supported")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in ("ngram", "ngram_gpu", "suffix"):
        raise ValueError(
            f"HRM-Text: speculative method {speculative.method!r} is not supported; no draft model exists for it. "
            "Use 'ngram'"
        )
    if not vllm_config.scheduler_config.enable_chunked_prefill:
        logger.info("HRM-Text: chunked prefill was switched off; it is exact and need not be")
    if not current_platform.is_cpu() and not vllm_config.use_v2_model_runner:
        raise ValueError(
            "HRM-Text on a GPU needs vLLM's Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER=0, or the option "
            "that vLLM's log names as unsupported by it"
        )


def _set_token_budget(vllm_config: VllmConfig) -> None:
    """Leave a default budget to prompts: any span fits, and a full batch of decodes comes on top.

    Spans are not cut, so one that lacks a few tokens of room waits for the next step, and its room stays empty: with
    decodes inside the budget that happens at every step of equal prompts whose length divides it.
    """
    scheduler = vllm_config.scheduler_config
    speculative = vllm_config.speculative_config
    drafts = speculative.num_speculative_tokens if speculative is not None else 0
    prompts = max(vllm_config.model_config.max_model_len, scheduler.max_num_batched_tokens)
    if not budget_is_explicit.get():
        scheduler.max_num_batched_tokens = prompts + scheduler.max_num_seqs * (1 + drafts)
        logger.info("HRM-Text: max_num_batched_tokens set to %d", scheduler.max_num_batched_tokens)


def _set_attention_backend(vllm_config: VllmConfig) -> None:
    """Choose a supported backend where the user chose none, and refuse the others by name."""
    attention = vllm_config.attention_config
    if current_platform.is_cpu():
        return
    if attention.backend is None:
        flash = vllm_config.model_config.dtype in (torch.float16, torch.bfloat16)
        attention.backend = AttentionBackendEnum.FLASH_ATTN if flash else AttentionBackendEnum.TRITON_ATTN
    elif attention.backend.name not in SUPPORTED_BACKENDS:
        raise ValueError(
            f"HRM-Text: attention backend {attention.backend.name} is not supported: PrefixLM needs causal and "
            f"bidirectional sequences in one batch; use FLASH_ATTN or TRITON_ATTN"
        )


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that CUDA graphs are captured for: vLLM's own up to 64, half as many to 128, a quarter beyond."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 513, 64)]
    return [size for size in sizes if size <= most]


def _set_graph_sizes(vllm_config: VllmConfig) -> None:
    """23 sizes of graphs where vLLM would capture 51, if the user names none.

    Each costs a second or two of the start, twice 128 layer calls long; a padded row of a decode step next to nothing.
    """
    compilation = vllm_config.compilation_config
    named = compilation.cudagraph_capture_sizes is not None or compilation.max_cudagraph_capture_size is not None
    drafts = vllm_config.speculative_config is not None  # graphs for several tokens a request: vLLM's business
    if current_platform.is_cpu() or named or drafts or vllm_config.performance_mode == "interactivity":
        return
    compilation.cudagraph_capture_sizes = graph_sizes(2 * vllm_config.scheduler_config.max_num_seqs)


def _keep_eager_on_cpu(vllm_config: VllmConfig) -> None:
    """No torch.compile on a CPU unless it was asked for.

    It takes most of a minute for the demo checkpoint and needs a C++ compiler, also for the one
    function that ranks log-probs, which would otherwise stall or stop the first request that wants them.
    """
    if not current_platform.is_cpu() or vllm_config.compilation_config.mode is not None:
        return
    logger.info("HRM-Text: torch.compile is left off on a CPU; ask for it with -cc.mode=3")
    vllm_config.compilation_config.mode = CompilationMode.NONE
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # for the processes that vLLM starts
    import torch._dynamo  # a second's import, so only where it is needed

    torch._dynamo.config.disable = True


def _leave_prefill_to_the_kernels(vllm_config: VllmConfig) -> None:
    """No torch.compile where every step will run on the fused kernels, unless it was asked for: 16 s of each start.

    Decided from what is known before a GPU is touched, for vLLM has yet to fork. Where the worker then finds a reason
    against the kernels, its log says so, and vLLM's layers run uncompiled.
    """
    compilation = vllm_config.compilation_config
    asked = compilation.mode is not None or compilation.cudagraph_mode is not None
    if current_platform.is_cpu() or asked or vllm_config.model_config.enforce_eager:
        return
    if why_not_ahead(vllm_config) is None:
        logger.info("HRM-Text: torch.compile is left off: every step runs on the fused kernels; -cc.mode=3 asks for it")
        compilation.mode = CompilationMode.NONE
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        begin_compiling(vllm_config)


def why_not_ahead(vllm_config: VllmConfig) -> str | None:
    """Why not every step will run on the fused kernels; None when it will."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    capability = current_platform.get_device_capability()
    major = capability.major if current_platform.is_cuda() and capability is not None else 0
    off = launch.why_off_at(major)
    if off is not None or major != 9:
        return off or "FlashAttention 3, which the graphs of steps with prompts need, runs on Hopper GPUs only"
    if parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1:
        return "parallelism"
    if model.quantization is not None or vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16"):
        return "quantisation"
    if vllm_config.attention_config.backend != AttentionBackendEnum.FLASH_ATTN or model.dtype != torch.bfloat16:
        return "another attention backend or dtype"
    return why_not_config(vllm_config)
