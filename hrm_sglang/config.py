"""Engine configuration for HRM-Text: undo what SGLang forces on it, and refuse what would be wrong."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hrm_sglang import lora
from hrm_sglang.attention_backends import SUPPORTED_BACKENDS, default_backend, unsupported
from hrm_sglang.spans import is_hrm_text
from hrm_text.config import read_config

STEP = "handle_model_capability_adjustments"
CACHE = "hrm_text"

_RAW_KEYS = "it keys KV by token ids alone, which is wrong inside a span"
# Field of ServerArgs, the values that are fine, and why any other is refused.
REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("enable_hierarchical_cache", (False, None), f"HiCache is not supported: {_RAW_KEYS}"),
    ("enable_lmcache", (False, None), f"LMCache is not supported: {_RAW_KEYS}"),
    ("enable_flexkv", (False, None), f"FlexKV is not supported: {_RAW_KEYS}"),
    ("enable_unified_cache_external_linker", (False, None), f"an external cache is not supported: {_RAW_KEYS}"),
    ("disaggregation_mode", ("null", None), f"PD disaggregation is not supported: {_RAW_KEYS}"),
    ("enable_session_radix_cache", (False, None), f"the session cache is not supported: {_RAW_KEYS}"),
    ("enable_streaming_session", (False, None), "streaming sessions are not supported: a span must be known whole"),
    ("speculative_algorithm", (None,), "speculative decoding is not supported: it is not shown exact yet"),
    ("dllm_algorithm", (None,), "diffusion decoding is not supported"),
    ("enable_deterministic_inference", (False, None), "deterministic inference moves chunk ends off span bounds"),
    ("enable_dynamic_chunking", (False, None), "dynamic chunk sizes are not supported"),
    ("enable_two_batch_overlap", (False, None), "two-batch overlap is not supported"),
    ("enable_pdmux", (False, None), "PD multiplexing is not supported"),
    ("enable_prefill_cp", (False, None), "context parallelism is not supported"),
    ("enable_kv_cache_sharding", (False, None), "KV cache sharding is not supported"),
    ("dcp_size", (1, None), "decode context parallelism is not supported"),
    ("pp_size", (1, None), "pipeline parallelism is not supported; use tensor parallelism"),
    ("grpc_mode", (False, None), "the gRPC server is not supported: it was not seen to check a request's spans"),
    ("smg_grpc_mode", (False, None), "the gRPC server is not supported: it was not seen to check a request's spans"),
    ("is_embedding", (False, None), "embedding is not supported, only generation"),
    ("page_size", (1, None), "the page size must be 1, or a cache hit could end inside a span's first keys"),
    ("radix_cache_backend", (None, CACHE), "another radix cache is not supported"),
    ("schedule_policy", ("lpm", "fcfs", "lof", "random", "dfs-weight", "hrrn", "priority", None), "not supported"),
)


def resolving(server_args: Any, previous: Callable[[Any], None]) -> None:
    """For the resolution step `handle_model_capability_adjustments` (SGLang 0.5.23).

    The built-in step forces the Triton backend and switches chunked prefill, the radix cache and every
    graph off when it finds `prefix_lm`; it finds false while it runs, and nothing else reads it then.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of

    hf_config = model_config_of(server_args).hf_config
    if not is_hrm_text(hf_config):
        previous(server_args)
        return
    read_config(hf_config.to_dict())
    _refuse_unsupported(server_args)
    with _hidden_prefix_lm(hf_config):
        previous(server_args)
    _configure(server_args)


@contextmanager
def _hidden_prefix_lm(hf_config: Any) -> Iterator[None]:
    value = getattr(hf_config, "prefix_lm", True)
    hf_config.prefix_lm = False
    try:
        yield
    finally:
        hf_config.prefix_lm = value


def _refuse_unsupported(server_args: Any) -> None:
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.environ import envs

    if envs.SGLANG_RUST_SERVER.get():
        raise ValueError("HRM-Text: SGLANG_RUST_SERVER=1 is not supported: it does not check a request's spans")
    view = resolving_view(server_args)
    for field, fine, reason in REFUSED:
        # A page size that SGLang chose for a backend of its own choice is not the user's; ours replaces both.
        value = getattr(server_args if field == "page_size" else view, field, None)
        if value not in fine:
            raise ValueError(f"HRM-Text: {field}={value!r}: {reason}")


def _lora_targets(view: Any) -> set[str] | None:
    """Every projection takes adapters, whichever of them the user or the first adapters name.

    SGLang would look for its own names, of which gate_proj leads to the MLP's alone.
    """
    if not view.enable_lora and (view.enable_lora is False or not view.lora_paths):
        return view.lora_target_modules
    for name in ("embed_tokens", "lm_head"):
        if name in (view.lora_target_modules or ()):
            raise ValueError(
                f"HRM-Text: lora_target_modules={name!r} is not supported; adapters are for the projections "
                "of the two stacks"
            )
    return set(lora.TARGETS)


def _default_backend(server_args: Any) -> str:
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
    from sglang.srt.runtime_context import get_platform

    view, hopper = resolving_view(server_args), get_platform().is_hopper_with_cuda_12_3
    return default_backend(view.device, hopper, model_config_of(server_args).dtype, view.kv_cache_dtype)


def _configure(server_args: Any) -> None:
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    view = resolving_view(server_args)
    chosen = server_args.attention_backend
    for field in ("prefill_attention_backend", "decode_attention_backend"):
        if getattr(view, field, None) not in (None, *SUPPORTED_BACKENDS):
            raise ValueError(unsupported(getattr(view, field)))
    if chosen is not None and chosen not in SUPPORTED_BACKENDS:
        raise ValueError(unsupported(chosen))
    declare_resolution(
        server_args,
        "hrm_text",
        attention_backend=chosen or _default_backend(server_args),
        radix_cache_backend=CACHE,
        page_size=1,
        lora_target_modules=_lora_targets(view),
        # A prefill cut at span bounds has another shape each time; decode graphs stay.
        cuda_graph_config=with_phase(view.cuda_graph_config, Phase.PREFILL, backend=Backend.DISABLED),
    )
