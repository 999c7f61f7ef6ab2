"""What SGLang's configuration becomes for HRM-Text, and what is refused, without starting an engine."""

from typing import Any

import pytest
import torch

pytest.importorskip("sglang")


def resolve(path: str, **fields: Any) -> Any:
    """The resolved configuration of a server on `path`."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    args = ServerArgs(model_path=path, device="cpu", **fields)
    args.resolve_once()
    return resolving_view(args)


def test_nothing_is_switched_off(tiny: str) -> None:
    view = resolve(tiny, chunked_prefill_size=64)
    assert view.chunked_prefill_size == 64
    assert not view.disable_radix_cache
    assert view.radix_cache_backend == "hrm_text"
    assert view.attention_backend == "torch_native"
    assert view.page_size == 1


def test_a_chosen_backend_is_kept(tiny: str) -> None:
    assert resolve(tiny, attention_backend="triton").attention_backend == "triton"


@pytest.mark.parametrize(
    ("device", "hopper", "dtype", "kv_cache_dtype", "expected"),
    [
        ("cpu", False, torch.bfloat16, "auto", "torch_native"),
        ("cuda", True, torch.bfloat16, "auto", "fa3"),
        ("cuda", True, torch.float16, None, "fa3"),
        ("cuda", True, torch.float32, "auto", "triton"),
        ("cuda", True, torch.bfloat16, "fp8_e4m3", "triton"),
        ("cuda", False, torch.bfloat16, "auto", "triton"),
    ],
)
def test_the_backend_nobody_named(
    device: str, hopper: bool, dtype: torch.dtype, kv_cache_dtype: str | None, expected: str
) -> None:
    from hrm_sglang.attention_backends import default_backend

    assert default_backend(device, hopper, dtype, kv_cache_dtype) == expected


def test_every_projection_takes_adapters(tiny: str) -> None:
    from hrm_sglang.lora import TARGETS

    for named in ({"lora_target_modules": ["all"]}, {"lora_target_modules": ["q_proj"]}, {}):
        view = resolve(tiny, enable_lora=True, max_lora_rank=8, **named)
        assert view.lora_target_modules == set(TARGETS)
    assert resolve(tiny).lora_target_modules is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_backend": "flex_attention"}, "'flex_attention' is not supported.*use one of fa3, triton"),
        ({"enable_hierarchical_cache": True}, "HiCache is not supported: it keys KV by token ids alone"),
        ({"enable_lmcache": True}, "LMCache is not supported"),
        ({"disaggregation_mode": "prefill"}, "PD disaggregation is not supported"),
        ({"enable_session_radix_cache": True}, "the session cache is not supported"),
        ({"enable_streaming_session": True}, "streaming sessions are not supported"),
        ({"speculative_algorithm": "NGRAM"}, "speculative decoding is not supported: it is not shown exact yet"),
        ({"pp_size": 2}, "pipeline parallelism is not supported"),
        (
            {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "lm_head"]},
            "lora_target_modules='lm_head' is not supported",
        ),
        ({"page_size": 16}, "the page size must be 1"),
        (
            {"enable_deterministic_inference": True, "attention_backend": "triton"},
            "deterministic inference moves chunk ends",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_wrong_in_silence_is_refused(tiny: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"HRM-Text.*{message}"):
        resolve(tiny, **fields)


def test_names_lead_to_the_bundled_checkpoint() -> None:
    from hrm_text.names import nano_path

    view = resolve("hrm-text-nano")
    assert view.model_path == view.tokenizer_path == str(nano_path())
    assert view.served_model_name == "hrm-text-nano"


def test_a_server_that_would_bypass_admission_is_refused(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(ValueError, match="HRM-Text: SGLANG_RUST_SERVER=1 is not supported"):
        resolve(tiny)
