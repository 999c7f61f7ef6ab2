"""What the plugin makes of engine options, and what it refuses, with the field and the reason."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode, CUDAGraphMode, SchedulerConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from hrm_text.names import nano_path
from hrm_vllm.config import _leave_prefill_to_the_kernels, _set_graph_sizes, graph_sizes
from hrm_vllm.spans import rule_of
from tests.conftest import TINY, make_checkpoint

pytestmark = pytest.mark.cpu


def configure(model: str, **options: Any) -> Any:
    return EngineArgs(model=model, **options).create_engine_config()


@pytest.fixture
def edited(tmp_path: Path) -> Any:
    """Makes a tiny checkpoint whose config.json was edited; None removes a field."""

    def make(**fields: Any) -> str:
        folder = make_checkpoint(tmp_path / "edited")
        config = json.loads((folder / "config.json").read_text())
        config.update(fields)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return str(folder)

    return make


def test_nano_by_name() -> None:
    config = configure("hrm-text-nano")
    assert config.model_config.model == str(nano_path())
    assert config.model_config.served_model_name == "hrm-text-nano"
    rule = rule_of(config.model_config)
    assert rule is not None and rule.envelope == (6, 7) and rule.prefix_lm


def test_the_envelope_is_known_without_a_tokenizer() -> None:
    """The same prompt must not mean something else to an engine that takes token ids only."""
    for option in ("skip_tokenizer_init", "tokens_only"):
        rule = rule_of(configure("hrm-text-nano", **{option: True}).model_config)
        assert rule is not None and rule.envelope == (6, 7), option


def test_nano_by_name_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("vllm.engine.arg_utils.huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = configure("hrm-text-nano", tokenizer="hrm-text-nano").model_config
    assert config.model == config.tokenizer == str(nano_path())
    assert config.served_model_name == "hrm-text-nano"


def test_1b_by_its_variable(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    monkeypatch.setenv("HRM_TEXT_1B_PATH", tiny)
    config = configure("hrm-text-1b", skip_tokenizer_init=True)
    assert config.model_config.model == tiny
    assert config.model_config.served_model_name == "hrm-text-1b"


def test_nothing_is_switched_off() -> None:
    config = configure("hrm-text-nano")
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.scheduler_cls == "hrm_vllm.scheduler.make_scheduler"


def test_a_default_budget_holds_any_span_and_a_chosen_one_is_kept(tiny: str) -> None:
    default = configure(tiny, skip_tokenizer_init=True, max_num_seqs=2000).scheduler_config
    assert default.max_num_batched_tokens >= 256 + 2000
    # Decodes come on top: prompts that fill vLLM's own budget together do so still while a full batch decodes.
    usual = configure(tiny, skip_tokenizer_init=True, max_num_seqs=100).scheduler_config
    assert usual.max_num_batched_tokens == SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS + 100
    chosen = configure(tiny, skip_tokenizer_init=True, max_num_seqs=64, max_num_batched_tokens=64).scheduler_config
    assert chosen.max_num_batched_tokens == 64


@pytest.mark.parametrize("most", [1, 3, 5, 60, 128, 200, 256, 1024])
def test_every_decode_batch_has_a_graph_that_is_not_much_larger(most: int) -> None:
    sizes = graph_sizes(min(512, 2 * most))
    assert len(sizes) <= 23
    for batch in range(1, min(most, 512) + 1):
        fitting = min(size for size in sizes if size >= batch)
        assert fitting <= max(batch + 7, 1.25 * batch)


@pytest.mark.parametrize(
    ("named", "options", "expected"),
    [
        (None, {}, [1, 2, 4, 8]),
        ([1, 3], {}, [1, 3]),
        (None, {"performance_mode": "interactivity"}, None),
        (None, {"speculative_config": object()}, None),
    ],
)
def test_graph_sizes_that_are_named_are_kept(
    monkeypatch: pytest.MonkeyPatch, named: list[int] | None, options: dict[str, Any], expected: list[int] | None
) -> None:
    monkeypatch.setattr("hrm_vllm.config.current_platform", SimpleNamespace(is_cpu=lambda: False))
    compilation = SimpleNamespace(cudagraph_capture_sizes=named, max_cudagraph_capture_size=None)
    rest = {"speculative_config": None, "performance_mode": "balanced"} | options
    config: Any = SimpleNamespace(
        compilation_config=compilation, scheduler_config=SimpleNamespace(max_num_seqs=6), **rest
    )
    _set_graph_sizes(config)
    assert compilation.cudagraph_capture_sizes == expected


def test_long_prefill_threshold_is_off(tiny: str) -> None:
    config = configure(tiny, skip_tokenizer_init=True, long_prefill_token_threshold=16)
    assert config.scheduler_config.long_prefill_token_threshold == 0


def test_prefix_lm_false_is_causal(edited: Any) -> None:
    rule = rule_of(configure(edited(prefix_lm=False), skip_tokenizer_init=True).model_config)
    assert rule is not None and not rule.prefix_lm


BAD_FIELDS = {
    "num_key_value_heads": 1,
    "H_cycles": None,
    "L_cycles": None,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0},
    "num_hidden_layers": 15,
    "hidden_act": "gelu",
    "attention_bias": True,
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_config_that_cannot_be_served_is_refused(edited: Any, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        configure(edited(**{field: BAD_FIELDS[field]}), skip_tokenizer_init=True)


BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "scheduler": {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    "kv_transfer_config": {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}},
    "enable-prompt-embeds": {"enable_prompt_embeds": True},
    "--runner": {"runner": "pooling"},
    "--model-impl": {"model_impl": "transformers"},
}


@pytest.mark.parametrize("named", BAD_OPTIONS)
def test_an_option_that_would_be_wrong_in_silence_is_refused(tiny: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        configure(tiny, skip_tokenizer_init=True, **BAD_OPTIONS[named])


def test_another_class_in_the_config_is_refused(edited: Any) -> None:
    with pytest.raises(ValueError, match="architectures"):
        configure(edited(architectures=["OtherForCausalLM"]), skip_tokenizer_init=True)


def test_a_backend_with_one_causal_flag_a_batch_is_refused() -> None:
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend

    from hrm_vllm.attention import prefix_lm_backend

    with pytest.raises(ValueError, match=r"FLEX_ATTENTION.*FLASH_ATTN, TRITON_ATTN, CPU_ATTN"):
        prefix_lm_backend(FlexAttentionBackend)


def test_a_tokenizer_without_the_markers_is_refused(tiny: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = make_checkpoint(tmp_path / "plain", **TINY)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        folder
    )
    with pytest.raises(ValueError, match="im_start"):
        configure(str(folder))


@pytest.mark.parametrize(
    ("part", "changes", "compiled"),
    [
        ("", {}, False),
        ("compilation_config", {"mode": CompilationMode.VLLM_COMPILE}, True),
        ("compilation_config", {"cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE}, True),
        ("model_config", {"enforce_eager": True}, True),
        ("model_config", {"quantization": "fp8"}, True),
        ("model_config", {"dtype": torch.float32}, True),
        ("cache_config", {"cache_dtype": "fp8"}, True),
        ("parallel_config", {"tensor_parallel_size": 2}, True),
        ("parallel_config", {"pipeline_parallel_size": 2}, True),
        ("parallel_config", {"data_parallel_size": 2}, True),
        ("attention_config", {"backend": AttentionBackendEnum.TRITON_ATTN}, True),
        ("", {"lora_config": object()}, True),
        ("", {"speculative_config": object()}, True),
        ("platform", {"major": 8}, True),
        ("platform", {"is_cpu": lambda: True}, True),
        ("platform", {"major": 8, "option": "1"}, True),
        ("environment", {"HRM_TEXT_KERNELS": "0"}, True),
    ],
)
def test_nothing_is_compiled_where_every_step_is_the_kernels(
    monkeypatch: pytest.MonkeyPatch, part: str, changes: dict[str, Any], compiled: bool
) -> None:
    """And what vLLM's own layers have to run is compiled as ever, as is what a user wants compiled."""
    pytest.importorskip("triton")
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, major=9)
    platform.get_device_capability = lambda: platform
    config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(mode=None, cudagraph_mode=None),
        model_config=SimpleNamespace(enforce_eager=False, quantization=None, dtype=torch.bfloat16),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1),
        attention_config=SimpleNamespace(backend=AttentionBackendEnum.FLASH_ATTN),
        speculative_config=None,
        lora_config=None,
    )
    monkeypatch.delenv("HRM_TEXT_KERNELS", raising=False)
    if part == "environment":
        monkeypatch.setenv("HRM_TEXT_KERNELS", changes["HRM_TEXT_KERNELS"])
    else:
        if "option" in changes:
            monkeypatch.setenv("HRM_TEXT_KERNELS", changes["option"])
        changed = platform if part == "platform" else getattr(config, part) if part else config
        vars(changed).update(changes)
    monkeypatch.setattr("hrm_vllm.config.current_platform", platform)
    begun: list[Any] = []
    monkeypatch.setattr("hrm_vllm.config.begin_compiling", begun.append)
    before = vars(config.compilation_config).copy()
    _leave_prefill_to_the_kernels(config)
    uncompiled = {"mode": CompilationMode.NONE, "cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY}
    assert vars(config.compilation_config) == (before if compiled else uncompiled)
    assert begun == ([] if compiled else [config])
