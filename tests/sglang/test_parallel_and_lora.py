"""Tensor parallelism and LoRA, against the oracle."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("sglang")

from hrm_text.oracle import load_reference
from tests.adapters import make_adapter, merged, scaled_adapter
from tests.conftest import make_checkpoint
from tests.sglang.engine import TOLERANCE, Engine, deviation, generate, prompt, worst_deviation
from tests.sglang.sabotage import VARIABLE
from tests.sglang.test_prefix_cache import flush
from tests.vllm.engine import Answer, Ask

ASKS = [
    Ask(prompt(120), (0, 50, 60, 110), 8),
    Ask(prompt(60, seed=2), None, 8),
    Ask(prompt(90, seed=3), (), 8, score=True),
]
# SGLang gives each rank a NUMA node of its own unless it is told which cores are whose.
TWO_RANKS: dict[str, Any] = {"tp_size": 2, "env": {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}}
LORA: dict[str, Any] = {"enable_lora": True, "lora_backend": "torch_native", "max_loras_per_batch": 3}


class Adapters(NamedTuple):
    """Folders of adapters by name, and the oracle's model for each; None is the base model."""

    paths: dict[str, str]
    models: dict[str | None, Any]


def make_adapters(folder: Path, path: str, reference: Any) -> Adapters:
    """Adapters for the checkpoint at `path`, over every projection and over some."""
    folders = {
        "full": make_adapter(folder / "full", reference),
        "scaled": scaled_adapter(folder / "scaled", reference),
        # One part of each fused projection.
        "sparse": make_adapter(folder / "sparse", reference, rank=3, seed=3, only=".gate_proj"),
    }
    models: dict[str | None, Any] = {None: reference}
    for name, adapter in folders.items():
        models[name] = merged(path, adapter)
    return Adapters({name: str(adapter) for name, adapter in folders.items()}, models)


@pytest.fixture(scope="module")
def adapters(tiny: str, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return make_adapters(tmp_path_factory.mktemp("adapters"), tiny, reference)


@pytest.fixture(scope="module")
def engine(tiny: str, adapters: Adapters) -> Iterator[Engine]:
    with Engine(model_path=tiny, lora_paths=adapters.paths, chunked_prefill_size=64, **LORA) as running:
        yield running


def check(adapters: Adapters, asks: Sequence[Ask], names: Sequence[str | None], answers: list[list[Answer]]) -> None:
    """Each answer is its adapter's, and nobody else's."""
    for ask, name, answer in zip(asks, names, answers, strict=True):
        for other, model in adapters.models.items():
            found = deviation(model, ask, answer)
            assert found <= TOLERANCE if other == name else found > 100 * TOLERANCE, (name, other, found)


def test_tensor_parallel(tiny: str, reference: Any) -> None:
    with Engine(model_path=tiny, chunked_prefill_size=64, **TWO_RANKS) as engine:
        assert worst_deviation(reference, engine, ASKS) <= TOLERANCE
        # Again, from the radix cache; each rank has one of its own.
        (answers,) = engine.ask([ASKS[0]])
        assert answers[0].cached == len(ASKS[0].prompt) - 1
        assert deviation(reference, ASKS[0], answers) <= TOLERANCE


@pytest.mark.parametrize("name", ["full", "scaled", "sparse", None])
def test_an_adapter_equals_merged_weights(engine: Engine, adapters: Adapters, name: str | None) -> None:
    check(adapters, ASKS, [name] * len(ASKS), engine.call(generate, ASKS, [name] * len(ASKS)))


def test_one_batch_mixes_adapters_and_the_base_model(engine: Engine, adapters: Adapters) -> None:
    asks = [ASKS[0], ASKS[1], ASKS[2], ASKS[1], Ask(prompt(70, seed=9), (0, 30), 8)]
    names = [None, "full", "scaled", "scaled", "full"]
    check(adapters, asks, names, engine.call(generate, asks, names))


def test_the_radix_cache_keeps_adapters_apart(engine: Engine, adapters: Adapters) -> None:
    engine.call(flush)
    ask = ASKS[0]
    for name in (None, "full", "scaled"):
        for hit in (0, len(ask.prompt) - 1):
            answers = engine.call(generate, [ask], [name])
            assert answers[0][0].cached == hit
            check(adapters, [ask], [name], answers)


def test_an_adapter_is_loaded_or_refused_while_serving(
    engine: Engine, adapters: Adapters, tiny: str, reference: Any, tmp_path: Path
) -> None:
    good, bad = (make_adapter(tmp_path / name, reference, rank=2, seed=4) for name in ("good", "bad"))
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"v_proj": 3}}))
    assert "v_proj.lora_A.weight' has shape (2, 64); this model and rank 3 need (3, 64)" in engine.call(
        load, "bad", str(bad)
    )
    assert engine.call(load, "good", str(good)) == ""
    with_good = Adapters(adapters.paths, {**adapters.models, "good": merged(tiny, good)})
    check(with_good, ASKS[:2], ["good", None], engine.call(generate, ASKS[:2], ["good", None]))


def load(engine: Any, name: str, path: str) -> str:
    """Load an adapter; why it was refused, or nothing."""
    return engine.load_lora_adapter(name, path).error_message or ""


@pytest.mark.slow
def test_tensor_parallel_adapters(tmp_path: Path) -> None:
    # On a CPU, SGLang pads an MLP whose halves are no multiples of 32.
    path = make_checkpoint(tmp_path / "aligned", intermediate_size=128)
    adapters = make_adapters(tmp_path, str(path), load_reference(path))
    with Engine(model_path=str(path), lora_paths=adapters.paths, **LORA, **TWO_RANKS) as engine:
        names = [None, "full", "scaled"]
        check(adapters, ASKS, names, engine.call(generate, ASKS, names))


def test_stacks_that_share_layer_numbers_are_seen(tiny: str, adapters: Adapters) -> None:
    """The negative control: H's adapters in the place of L's."""
    env = {VARIABLE: "lora_numbers_shared"}
    with Engine(model_path=tiny, lora_paths=adapters.paths, env=env, **LORA) as engine:
        answers = engine.call(generate, ASKS[:1], ["full"])
        assert deviation(adapters.models["full"], ASKS[0], answers[0]) > 100 * TOLERANCE
