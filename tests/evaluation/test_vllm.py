"""The tasks through vLLM's server: nano's own items, and log-likelihoods that no answer can raise by seeing itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from transformers import AutoTokenizer

from hrm_text.evaluation.server import EvalError, Server
from hrm_text.names import NANO, nano_path
from hrm_text.oracle import load_reference, token_logprobs
from tests.evaluation.nano_answers import check_all_groups, load_tasks, served

pytestmark = [pytest.mark.cpu, pytest.mark.slow]
OPTIONS = ("--dtype", "float32", "--enforce-eager")
# Log-prob ranks are compiled with a C++ compiler on first use: 20 s a server, no use here.
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
SUBJECTS = ("world_religions", "miscellaneous")  # whose five shots fit nano's 1024 positions
DOCUMENTS = 3


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        yield patch


@pytest.fixture(scope="module")
def plugin(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("vllm", NANO, tmp_path_factory.mktemp("plugin") / "log", options=OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def in_tree(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log, own = tmp_path_factory.mktemp("in-tree") / "log", {"VLLM_PLUGINS": ""}
    with Server("vllm", str(nano_path()), log, options=OPTIONS, environment=own, plugin=False) as server:
        yield server


def test_nano_answers_as_in_transformers(plugin: Server, tmp_path: Path) -> None:
    check_all_groups(plugin, tmp_path, 12)


def test_server_without_the_plugin_is_refused(in_tree: Server, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="without this package's plugin"), Server("vllm", NANO, tmp_path, in_tree.url):
        pass


def test_loglikelihood_rises_only_where_the_answer_sees_itself(
    plugin: Server, in_tree: Server, data: Path, tmp_path: Path
) -> None:
    loaded = load_tasks("hrm_mmlu_loglikelihood", data_dir=str(data))["tasks"]
    tasks = {name: loaded[name] for name in (f"hrm_mmlu_loglikelihood::{subject}" for subject in SUBJECTS)}
    oracle = {visible: _oracle(tasks, visible) for visible in (False, True)}
    measured = {
        "plugin": _measured(plugin, tmp_path / "plugin", tasks),
        "in-tree": _measured(in_tree, tmp_path / "in-tree", tasks),
    }
    for name in tasks:
        assert measured["plugin"][name] == pytest.approx(oracle[False][name], abs=1e-5)
        assert measured["in-tree"][name] == pytest.approx(oracle[True][name], abs=1e-5)
        assert measured["in-tree"][name] > measured["plugin"][name] + 0.2


def _measured(server: Server, folder: Path, tasks: dict[str, Any]) -> dict[str, float]:
    results = served(server, folder, {"tasks": tasks}, DOCUMENTS)["results"]
    return {name: results[name]["logprob,none"] for name in tasks}


def _oracle(tasks: dict[str, Any], visible: bool) -> dict[str, float]:
    """Mean log-prob of the right letters; with `visible` they are in the span too, as the in-tree model has it."""
    reference, tokenizer = load_reference(str(nano_path())), AutoTokenizer.from_pretrained(nano_path())
    means = {}
    for name, task in tasks.items():
        logprobs = []
        for doc in list(task.eval_docs)[:DOCUMENTS]:
            assert doc["fits"]
            context, letter = (
                tokenizer(text, add_special_tokens=False).input_ids
                for text in (doc["prompt"], doc["options"][doc["gold"]])
            )
            ids = (*context, *letter)
            spans = ((0, len(ids) if visible else len(context)),)
            logprobs.append(float(token_logprobs(reference, ids, spans)[len(context) - 1 :].sum()))
        means[name] = sum(logprobs) / len(logprobs)
    return means
