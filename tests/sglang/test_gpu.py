"""The exactness suite in short on a GPU: decode CUDA graphs, radix cache and chunks on, Triton and FA3.

`tests/yardstick.py` says what bf16 and float32 are compared with.
"""

import contextlib
import socket
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from hrm_text.oracle import load_reference
from tests.conftest import WIDE, make_checkpoint
from tests.engines_together import log_of, together
from tests.sglang.engine import FUSED_LOG, Engine, deviation, prompt, retractions
from tests.sglang.test_prefix_cache import CASES, P, flush
from tests.vllm.engine import Ask
from tests.yardstick import Yardstick, emitted_by, emitted_deviations, measure, of_engine, serve_mixes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

GPU: dict[str, Any] = {
    "on_gpu": True,
    "chunked_prefill_size": 48,
    "mem_fraction_static": 0.7,
    # PyTorch's own sampler: the default one compiles its kernels when it first starts.
    "sampling_backend": "pytorch",
    "max_running_requests": 24,
    # 24 for batches beyond the kernels for few tokens, and padded ones.
    "cuda_graph_config": {"decode": {"bs": [1, 2, 4, 8, 24]}},
    "log_level": "info",
}
# The fused kernels are on where nothing says otherwise, and so is FA3 for a model that it takes.
PLAIN: dict[str, Any] = {"env": {"HRM_TEXT_KERNELS": "0"}}
FLOAT32 = {"dtype": "float32"}
TRITON = {"attention_backend": "triton", "dtype": "bfloat16"}
DEFAULTS = {"dtype": "bfloat16"}
IN_TREE = {"env": {"SGLANG_PLUGINS": "none"}}
TIGHT = {"max_total_tokens": 360, "schedule_conservativeness": 0.1}
OURS: dict[str, dict[str, Any]] = {
    "triton float32": FLOAT32 | PLAIN,
    "triton float32 fused": FLOAT32,
    "triton float32 retraction": FLOAT32 | PLAIN | TIGHT,
    "triton bf16": TRITON | PLAIN,
    "fa3 bf16": DEFAULTS | PLAIN,
    "fa3 bf16 fused": DEFAULTS,
    "fa3 bf16 fused retraction": DEFAULTS | TIGHT,
    "fa3 bf16 mixed chunks": DEFAULTS | PLAIN | {"enable_mixed_chunk": True},
}
OTHERS: dict[str, dict[str, Any]] = {"in-tree bf16": TRITON | IN_TREE}
# Of vLLM's in-tree model on an H200: SGLang's own does not start in float32. Triton's attention rounds to TF32 in both.
YARDSTICK_FLOAT32 = Yardstick(mean=1.6e-4, largest=9.0e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("gpu"), "bfloat16", **WIDE))


@pytest.fixture(scope="module")
def gpu_reference(checkpoint: str) -> Any:
    """Float32 arithmetic on the bf16 weights."""
    return load_reference(checkpoint)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the engines' logs, one file each."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def engines(checkpoint: str, logs: Path) -> Iterator[Mapping[str, Engine]]:
    options = OURS | OTHERS
    ports = free_ports(len(options))
    makers = {
        name: partial(Engine, model_path=checkpoint, nccl_port=port, **(GPU | options[name]))
        for name, port in zip(options, ports, strict=True)
    }
    with together(makers, logs, True) as started:
        yield started


def free_ports(count: int) -> list[int]:
    """Ports that differ: engines that choose their own at the same time can choose the same."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def yardsticks(engines: Mapping[str, Engine], gpu_reference: Any) -> dict[str, Yardstick]:
    return {"float32": YARDSTICK_FLOAT32} | measure(engines, gpu_reference)


@pytest.mark.parametrize("name", OURS)
def test_mixes(name: str, engines: Mapping[str, Engine], gpu_reference: Any, yardsticks: dict[str, Yardstick]) -> None:
    emitted, worst = serve_mixes(engines[name], gpu_reference, deviation, 96)
    mean = sum(emitted) / len(emitted)
    print(f"\n{name}: {len(emitted)} tokens, mean {mean:.2e}, worst {worst:.2e}")
    yardstick = of_engine(name, yardsticks)
    assert mean <= 1.2 * yardstick.mean
    assert worst <= 2 * yardstick.largest


@pytest.mark.parametrize("name", [name for name in OURS if "retraction" in name])
def test_retracted_requests_are_computed_again(
    name: str, engines: Mapping[str, Engine], gpu_reference: Any, yardsticks: dict[str, Yardstick]
) -> None:
    """Six requests of 30 + 90 tokens in a pool of 360, which SGLang admits by an optimistic estimate."""
    batch = [Ask(prompt(30, seed), (0, 20), max_tokens=90) for seed in range(20, 26)]
    measured = Yardstick.of(emitted_by(gpu_reference, engines[name], batch))
    retracted, yardstick = engines[name].call(retractions), of_engine(name, yardsticks)
    print(f"\n{name}: {measured}, {retracted} retractions")
    assert retracted > 0
    assert measured.mean <= 1.2 * yardstick.mean
    assert measured.largest <= 2 * yardstick.largest


@pytest.mark.parametrize("name", [name for name in OURS if "retraction" not in name])
def test_cache_hits(
    name: str, engines: Mapping[str, Engine], gpu_reference: Any, yardsticks: dict[str, Yardstick]
) -> None:
    worst, hits = 0.0, 0
    for first, second, cached in CASES.values():
        engines[name].call(flush)
        engines[name].ask([first])
        (answers,) = engines[name].ask([second])
        assert answers[0].cached == cached
        hits += cached > 0
        worst = max(worst, deviation(gpu_reference, second, answers))
    print(f"\n{name}: {hits} hits, worst {worst:.2e}")
    assert hits >= 6
    assert worst <= 2 * of_engine(name, yardsticks).largest


def test_next_turn_reuses_generated_tokens(
    engines: Mapping[str, Engine], gpu_reference: Any, yardsticks: dict[str, Yardstick]
) -> None:
    engine = engines["triton float32"]
    (answers,) = engine.ask([Ask(P[:50], (0, 50), max_tokens=60)])
    second = Ask(P[:50] + answers[0].tokens + prompt(40, seed=9), (0, 50, 110, 150))
    (again,) = engine.ask([second])
    assert again[0].cached == 109
    assert deviation(gpu_reference, second, again) <= 2 * yardsticks["float32"].largest


@pytest.mark.parametrize("name", [name for name in OURS if "retraction" not in name])
def test_a_large_batch(
    name: str, engines: Mapping[str, Engine], gpu_reference: Any, yardsticks: dict[str, Yardstick]
) -> None:
    """Twenty requests in a graph of 24."""
    batch = [Ask(prompt(20 + 3 * seed, seed), (0, 15 + seed), 12) for seed in range(20)]
    emitted = emitted_by(gpu_reference, engines[name], batch)
    measured, yardstick = Yardstick.of(emitted), of_engine(name, yardsticks)
    print(f"\n{name}: {measured}")
    assert measured.mean <= 1.2 * yardstick.mean
    assert measured.largest <= 2 * yardstick.largest


@pytest.mark.parametrize("name", OURS)
def test_the_fused_kernels_run_where_they_should(name: str, engines: Mapping[str, Engine], logs: Path) -> None:
    engines[name].ask([Ask(P[:9], (), 4)])
    log = log_of(logs, name)
    assert (FUSED_LOG in log) == ("fused" in name)
    # And those for more tokens stream, for it says nothing else.
    assert ("(weights staged in shared memory)" in log) == ("bf16 fused" in name)
    assert ("graphs of steps with prompts: 54" in log) == (name.startswith("fa3") and "fused" in name)


def test_the_backend_is_the_one_that_was_named_or_fits(engines: Mapping[str, Engine]) -> None:
    for name in OURS:
        assert engines[name].call(backend) == name.split()[0]


def backend(engine: Any) -> str:
    return engine.get_server_info()["attention_backend"]


def test_decode_graphs_are_captured(engines: Mapping[str, Engine]) -> None:
    for name in OURS:
        assert engines[name].call(decode_graphs) == ("full", [1, 2, 4, 8, 24]), name
    assert engines["in-tree bf16"].call(decode_graphs)[0] == "disabled"


def decode_graphs(engine: Any) -> tuple[str, list[int]]:
    """Backend and batch sizes of the decode graphs."""
    decode = engine.get_server_info()["cuda_graph_config"]["decode"]
    return decode["backend"], decode["bs"]


def test_a_wrong_mask_would_show(
    engines: Mapping[str, Engine], gpu_reference: Any, yardsticks: dict[str, Yardstick]
) -> None:
    """Negative control: the same prompt served causally is far from the oracle of one span."""
    (answers,) = engines["triton float32"].ask([Ask(P, (), 8)])
    worst = max(emitted_deviations(gpu_reference, P, ((0, len(P)),), answers))
    print(f"\nserved causally: worst {worst:.2e}")
    assert worst > 3 * yardsticks["float32"].largest
