"""Every hook fails closed: what it attaches to is gone, and start-up stops with its name."""

import importlib
from functools import reduce
from typing import Any

import pytest

pytest.importorskip("sglang")

import hrm_sglang
from hrm_sglang import compat
from hrm_sglang.hooks import HookError, wrap
from hrm_sglang.install import all_hooks, install

WRAPPED = {
    "request spans": "sglang.srt.managers.tokenizer_manager:TokenizerManager._create_tokenized_object",
    "requests by id": "sglang.srt.managers.schedule_batch:Req.__init__",
    "first chunks": "sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
    "further chunks": "sglang.srt.managers.schedule_policy:PrefillAdder.add_chunked_req",
    "input log-probs _process_input_top_logprobs": "sglang.srt.managers.scheduler_components."
    "logprob_result_processor:SchedulerLogprobResultProcessor._process_input_top_logprobs",
    "chat": "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._process_messages",
    "LoRA layer numbers": "sglang.srt.lora.lora_manager:get_layer_id",
    "LoRA checks": "sglang.srt.lora.lora_manager:LoRAManager.validate_new_adapter",
    "LoRA tensors": "sglang.srt.lora.lora:LoRAAdapter._process_weight",
    "LoRA stacking": "sglang.srt.lora.lora:LoRAAdapter._normalize_weights",
}


def _owner(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    *owners, attribute = path.split(".")
    return reduce(getattr, owners, importlib.import_module(module)), attribute


def test_all_hold_and_installing_twice_is_harmless() -> None:
    install()
    originals = [getattr(*_owner(target)) for target in WRAPPED.values()]
    install()
    assert all(hook.holds() for hook in all_hooks())
    assert [getattr(*_owner(target)) for target in WRAPPED.values()] == originals


@pytest.mark.parametrize("name", [name for name in WRAPPED if name != "requests by id"])
def test_a_target_that_is_gone_stops_start_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(*_owner(WRAPPED[name]))
    with pytest.raises(HookError, match=rf"'{name}'.*SGLang 0\.5\.2"):
        install()
    # SGLang logs an Exception of a plugin and goes on with the in-tree model.
    with pytest.raises(SystemExit, match=rf"SGLang is not started.*'{name}'"):
        hrm_sglang.register()


@pytest.mark.parametrize("name", WRAPPED)
def test_a_hook_that_was_undone_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    owner, attribute = _owner(WRAPPED[name])
    monkeypatch.setattr(owner, attribute, getattr(owner, attribute).__wrapped__)
    assert [hook.name for hook in all_hooks() if not hook.holds()] == [name]


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.5.19", "0.5.24", "0.6.0"):
        monkeypatch.setattr("sglang.version.__version__", version)
        with pytest.raises(HookError, match=r"0\.5\.20 to 0\.5\.23"):
            compat.check_version()
    for version in ("0.5.20", "0.5.22.post1"):
        monkeypatch.setattr("sglang.version.__version__", version)
        compat.check_version()


def test_a_missing_module_names_the_hook() -> None:
    with pytest.raises(HookError, match="'gone'"):
        wrap("gone", "sglang.no_such_module:f", lambda original: original).install()
