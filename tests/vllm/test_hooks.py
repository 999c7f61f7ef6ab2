"""Every hook fails closed: what it attaches to is gone, and start-up stops with its name."""

import importlib
import sys
from functools import reduce
from typing import Any

import pytest
from vllm.plugins import load_general_plugins

from hrm_vllm import ARCHITECTURE, compat
from hrm_vllm.hooks import HookError, expect, wrap
from hrm_vllm.install import all_hooks, install

WRAPPED = {
    "model names": "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    "request spans": "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "no beam search": "vllm.v1.engine.input_processor:InputProcessor.resolve_watermarking",
    "prefix cache keys": "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
    "prompt logprobs": "vllm.v1.engine.logprobs:LogprobsProcessor.from_new_request",
    "model runner V1": "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
}


def test_all_hold_and_installing_twice_is_harmless() -> None:
    load_general_plugins()
    install()
    originals = [_lookup(target) for target in WRAPPED.values()]
    install()
    assert all(hook.holds() for hook in all_hooks())
    assert [_lookup(target) for target in WRAPPED.values()] == originals
    assert all(not hasattr(original.__wrapped__, "_hrm_text_hook") for original in originals)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_target_that_is_gone_stops_start_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, path = WRAPPED[name].partition(":")
    *owners, attribute = path.split(".")
    owner = reduce(getattr, owners, importlib.import_module(module))
    monkeypatch.delattr(owner, attribute)
    with pytest.raises(HookError, match=rf"'{name}'.*vLLM 0\.3"):
        install()


@pytest.mark.parametrize("name", WRAPPED)
def test_the_doctor_sees_a_hook_that_was_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    module, _, path = WRAPPED[name].partition(":")
    *owners, attribute = path.split(".")
    owner = reduce(getattr, owners, importlib.import_module(module))
    monkeypatch.setattr(owner, attribute, getattr(owner, attribute).__wrapped__)
    assert [hook.name for hook in all_hooks() if not hook.holds()] == [name]


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.31.2", "0.34.0"):
        monkeypatch.setattr(compat, "VLLM_VERSION", version)
        with pytest.raises(HookError, match=r"0\.32 and 0\.33"):
            install()
    for version in ("0.32.1", "0.33.0+cpu"):
        monkeypatch.setattr(compat, "VLLM_VERSION", version)
        install()


def test_a_passage_that_vllm_changed_is_noticed() -> None:
    file = "v1/core/sched/scheduler.py"
    assert expect("x", file, "self._reserve_prefill_lookahead(", times=2).holds()
    assert not expect("x", file, "self._reserve_prefill_lookahead(", times=3).holds()
    assert not expect("x", "v1/no_such_file.py", "anything").holds()


def test_a_missing_module_names_the_hook() -> None:
    with pytest.raises(HookError, match="'gone'"):
        wrap("gone", "vllm.no_such_module:f", lambda original: original).install()


def _lookup(target: str) -> Any:
    module, _, path = target.partition(":")
    return reduce(getattr, path.split("."), importlib.import_module(module))


def test_a_registry_that_changed_names_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models import registry

    monkeypatch.delattr(registry, "_LazyRegisteredModel")
    monkeypatch.delitem(sys.modules, "hrm_vllm.model_info")
    with pytest.raises(HookError, match=r"'model class'.*vLLM 0\.3.*_LazyRegisteredModel"):
        install()


def test_vllm_asks_about_the_model_without_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    def started(*_: Any) -> None:
        raise AssertionError("a process")

    install()
    monkeypatch.setattr(registry, "_run_in_subprocess", started)
    entry: Any = ModelRegistry.models[ARCHITECTURE]
    assert entry.inspect_model_cls().supports_pp
