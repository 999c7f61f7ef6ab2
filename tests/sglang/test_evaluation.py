"""The evaluation through SGLang's server: nano's own items, and log-likelihoods behind the span."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sglang")
pytest.importorskip("lm_eval")

from transformers import AutoTokenizer

from hrm_text.envelope import wrap_prompt
from hrm_text.evaluation.client import Ledger, ServedModel
from hrm_text.evaluation.server import Server
from hrm_text.names import NANO, nano_path
from hrm_text.oracle import load_reference, token_logprobs
from tests.evaluation.nano_answers import check_all_groups
from tests.sglang.engine import TOLERANCE, cpu_environment

OPTIONS = (
    "--device cpu --dtype float32 --max-total-tokens 4096 --mem-fraction-static 0.3 --max-running-requests 8 "
    "--sleep-on-idle"  # else it keeps a core busy while transformers computes
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment:
        for key, value in cpu_environment().items():
            environment.setenv(key, value)
        with Server("sglang", NANO, tmp_path_factory.mktemp("sglang") / "log", options=OPTIONS.split()) as running:
            yield running


def test_nano_answers_as_in_transformers(server: Server, tmp_path: Path) -> None:
    check_all_groups(server, tmp_path, 4)  # vLLM's suite has more of them; most of the time is transformers'


def test_answers_are_scored_behind_the_span(server: Server, tmp_path: Path) -> None:
    tokenizer, reference = AutoTokenizer.from_pretrained(nano_path()), load_reference(str(nano_path()))
    model = ServedModel(server, tokenizer, Ledger(tmp_path / "ledger"), lambda done, total: None)
    context = model.tok_encode(wrap_prompt("What is 12 + 30?"))
    for answer in ("42", "7"):
        ids = model.tok_encode(answer)
        expected = token_logprobs(reference, (*context, *ids), ((0, len(context)),))[len(context) - 1 :]
        ((logprob, _),) = model._loglikelihood_tokens([(None, context, ids)])
        assert logprob == pytest.approx(float(expected.sum()), abs=len(ids) * TOLERANCE)
