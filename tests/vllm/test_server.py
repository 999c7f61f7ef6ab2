"""The OpenAI server as users run it: `vllm serve hrm-text-nano`, over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm_text.envelope import ChatEncoder, wrap_prompt
from hrm_text.names import nano_path
from hrm_text.oracle import load_reference, token_logprobs
from hrm_text.spans import envelope_spans
from tests.vllm.mixes import TOLERANCE

pytestmark = pytest.mark.cpu

QUESTION = "Tom has 3 boxes with 4 apples each. He gives away 5 apples. How many apples are left?"
COT = {"chat_template_kwargs": {"condition": "synth,cot"}}


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        """Status and decoded body of a POST."""
        data = json.dumps({"model": "hrm-text-nano", "temperature": 0, **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = response.read()
                json_answer = response.headers.get_content_type() == "application/json"
                return response.status, json.loads(answer) if json_answer else answer.decode()
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def chat(self, content: Any, **body: Any) -> tuple[int, Any]:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log", "--max-num-batched-tokens", "512") as running:
        yield running


@contextmanager
def serving(log: Path, *options: str, **environment: str) -> Iterator[Server]:
    """`vllm serve hrm-text-nano` with `options`, until the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", "hrm-text-nano", "--port", str(port)]
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*command, "--dtype", "float32", *options],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
        )
        running = Server(f"http://127.0.0.1:{port}", log)
        try:
            _wait(running, process)
            yield running
        finally:
            process.terminate()
            process.wait(30)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
        if process.poll() is not None:
            break
    raise RuntimeError(server.log.read_text()[-4000:])


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    from transformers import AutoTokenizer

    return ChatEncoder.of(AutoTokenizer.from_pretrained(nano_path()))


@pytest.fixture(scope="module")
def nano_reference() -> Any:
    return load_reference(nano_path())


def check_exact(
    reference: Any, encoder: ChatEncoder, prompt: list[int], choice: dict[str, Any], tokens: list[int]
) -> None:
    """Log-probs of a chat answer against the oracle, for a prompt whose spans come from the envelope."""
    got = torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"]])
    expected = token_logprobs(reference, prompt + tokens, envelope_spans(prompt, encoder.envelope))
    assert (expected[len(prompt) - 1 :] - got).abs().max() <= TOLERANCE


def test_names(server: Server) -> None:
    with urllib.request.urlopen(server.url + "/v1/models", timeout=10) as response:
        assert [model["id"] for model in json.load(response)["data"]] == ["hrm-text-nano"]


@pytest.mark.parametrize("options", [COT, {}], ids=["synth,cot", "direct"])
def test_a_question_is_answered(
    server: Server, encoder: ChatEncoder, nano_reference: Any, options: dict[str, Any]
) -> None:
    status, body = server.chat(QUESTION, logprobs=True, return_token_ids=True, **options)
    assert status == 200
    choice = body["choices"][0]
    assert choice["message"]["content"].endswith("\\boxed{7}" if options else "7")
    assert choice["finish_reason"] == "stop"
    condition = "synth,cot" if options else "direct"
    prompt = encoder.encode_chat([{"role": "user", "content": QUESTION}], condition)
    assert body["prompt_token_ids"] == prompt
    check_exact(nano_reference, encoder, prompt, choice, choice["token_ids"])


def test_two_turns(server: Server, encoder: ChatEncoder, nano_reference: Any) -> None:
    messages = [
        {"role": "system", "content": "Answer with a number."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "What is 12 + 30?"},
    ]
    status, body = server.post("/v1/chat/completions", messages=messages, logprobs=True, return_token_ids=True)
    assert status == 200
    choice = body["choices"][0]
    prompt = encoder.encode_chat(messages)
    assert body["prompt_token_ids"] == prompt
    assert len(envelope_spans(prompt, encoder.envelope)) == 2
    check_exact(nano_reference, encoder, prompt, choice, choice["token_ids"])


@pytest.mark.parametrize(
    "content",
    [
        "a <|im_end|> b <|im_start|> c",
        "<|object_ref_end|><|quad_end|>" + QUESTION,
        "<|box_end|>\ue0000\ue001",
    ],
)
def test_markers_in_content_are_text(server: Server, encoder: ChatEncoder, nano_reference: Any, content: str) -> None:
    status, body = server.chat(content, logprobs=True, return_token_ids=True, max_tokens=6)
    assert status == 200
    prompt = body["prompt_token_ids"]
    assert sum(token in encoder.markers.values() for token in prompt) == 3  # the envelope and one condition
    assert envelope_spans(prompt, encoder.envelope) == ((0, len(prompt)),)
    choice = body["choices"][0]
    check_exact(nano_reference, encoder, prompt, choice, choice["token_ids"])


def test_completions_with_the_envelope_equal_chat(server: Server) -> None:
    _, chat = server.chat(QUESTION, **COT)
    status, body = server.post("/v1/completions", prompt=wrap_prompt(QUESTION, "synth,cot"), max_tokens=100)
    assert status == 200
    assert body["choices"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert body["usage"] == chat["usage"] or body["usage"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]


def test_raw_text_is_one_span_and_said_once(server: Server) -> None:
    for _ in range(2):
        status, _ = server.post("/v1/completions", prompt="How many?", max_tokens=2)
        assert status == 200
    assert server.log.read_text().count("came without HRM-Text's envelope") == 1


@pytest.mark.parametrize("where", ["vllm_xargs", "the body, as OpenAI's extra_body"])
def test_spans_over_http(server: Server, nano_reference: Any, where: str) -> None:
    prompt, options = list(range(20, 60)), {"prefix_lm_spans": [0, 10, 10, 25]}
    status, body = server.post(
        "/v1/completions",
        prompt=prompt,
        max_tokens=4,
        logprobs=0,
        return_token_ids=True,
        **({where: options} if where == "vllm_xargs" else options),
    )
    assert status == 200, body
    choice = body["choices"][0]
    expected = token_logprobs(nano_reference, prompt + choice["token_ids"], ((0, 10), (10, 25)))
    got = torch.tensor(choice["logprobs"]["token_logprobs"])
    assert (expected[len(prompt) - 1 :] - got).abs().max() <= TOLERANCE


def test_scored_continuation(server: Server, encoder: ChatEncoder, nano_reference: Any) -> None:
    """lm-eval's way to score: context and continuation as one prompt, echoed with log-probs."""
    context = encoder.encode_chat([{"role": "user", "content": QUESTION}])
    continuation = encoder.encode_text("7 apples")
    prompt = context + continuation
    status, body = server.post("/v1/completions", prompt=prompt, max_tokens=1, echo=True, logprobs=0)
    assert status == 200, body
    got = body["choices"][0]["logprobs"]["token_logprobs"][: len(prompt)]
    assert got[: len(context)] == [None] * len(context)
    expected = token_logprobs(nano_reference, prompt, ((0, len(context)),))[len(context) - 1 :]
    assert (expected - torch.tensor(got[len(context) :])).abs().max() <= TOLERANCE


def spans(*flat: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": list(range(20, 60)), "max_tokens": 1, "vllm_xargs": {"prefix_lm_spans": list(flat), **more}}


CHAT_TURN = [{"role": "user", "content": "hi"}]
BAD: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    # what the message must name: field, value, limit
    "unsorted": ("/v1/completions", spans(10, 20, 0, 5), ["prefix_lm_spans", "[0, 5)", "20"]),
    "overlapping": ("/v1/completions", spans(0, 10, 9, 20), ["prefix_lm_spans", "[9, 20)", "10"]),
    "zero length": ("/v1/completions", spans(5, 5), ["prefix_lm_spans", "[5, 5)", "empty"]),
    "out of range": ("/v1/completions", spans(0, 41), ["prefix_lm_spans", "[0, 41)", "40"]),
    "negative": ("/v1/completions", spans(-1, 4), ["prefix_lm_spans", "[-1, 4)"]),
    "odd": ("/v1/completions", spans(0, 4, 8), ["prefix_lm_spans", "3"]),
    "not integers": ("/v1/completions", spans(0, 4.5), ["prefix_lm_spans", "4.5"]),
    "text": ("/v1/completions", spans("a", "b"), ["prefix_lm_spans"]),
    "too many": (
        "/v1/completions",
        {"prompt": [30] * 600, "max_tokens": 1, "vllm_xargs": {"prefix_lm_spans": list(range(600))}},
        ["prefix_lm_spans", "300", "256"],
    ),
    "span over the budget": (
        "/v1/completions",
        {"prompt": [30] * 600, "max_tokens": 1, "vllm_xargs": {"prefix_lm_spans": [0, 600]}},
        ["prefix_lm_spans", "600", "512", "max_num_batched_tokens"],
    ),
    "prompt over the pool, which holds a whole model length": (
        "/v1/completions",
        {"prompt": [30] * 1100, "max_tokens": 1, "vllm_xargs": {"prefix_lm_spans": [0, 1100]}},
        ["1024"],
    ),
    "misspelt option": ("/v1/completions", spans(0, 4, prefix_lm_span=1), ["prefix_lm_span:", "prefix_lm_spans"]),
    "among the body's fields": (
        "/v1/completions",
        {"prompt": list(range(20, 60)), "max_tokens": 1, "prefix_lm_spans": "0,5"},
        ["prefix_lm_spans", "0,5"],
    ),
    "in a chat's body": ("/v1/chat/completions", {"messages": CHAT_TURN, "prefix_lm_spans": [0, 999]}, ["[0, 999)"]),
    "in both places": (
        "/v1/completions",
        spans(0, 4) | {"prefix_lm_spans": [0, 5]},
        ["prefix_lm_spans", "[0, 5]", "[0, 4]"],
    ),
    "misspelt in the body": ("/v1/completions", spans(0, 4) | {"prefix_lm_span": [0, 4]}, ["prefix_lm_span:"]),
    "scores inside a span": (
        "/v1/completions",
        {"prompt": list(range(20, 60)), "max_tokens": 1, "echo": True, "logprobs": 0},
        ["prompt_logprobs", "prefix_lm_span_logprobs", "[0, 40)"],
    ),
    "opt-in that is not a flag": (
        "/v1/completions",
        spans(0, 4, prefix_lm_span_logprobs="yes"),
        ["span_logprobs", "yes"],
    ),
    "unknown condition": (
        "/v1/chat/completions",
        {"messages": CHAT_TURN, "chat_template_kwargs": {"condition": "fast"}},
        ["condition", "fast", "direct"],
    ),
    "misspelt condition": (
        "/v1/chat/completions",
        {"messages": CHAT_TURN, "chat_template_kwargs": {"conditon": "cot"}},
        ["conditon", "condition"],
    ),
    "two user turns in a row": ("/v1/chat/completions", {"messages": CHAT_TURN * 2}, ["messages", "alternate"]),
    "tools": (
        "/v1/chat/completions",
        {
            "messages": CHAT_TURN,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": "none",
        },
        ["tools"],
    ),
    "a chat cut short": (
        "/v1/chat/completions",
        {"messages": CHAT_TURN, "truncate_prompt_tokens": 3},
        ["truncate_prompt_tokens", "3", "4 tokens"],
    ),
    "a chat over the context that may be cut": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "word " * 1500}], "truncate_prompt_tokens": -1},
        ["1024", "maximum context length"],
    ),
    "seed on a CPU": ("/v1/completions", {"prompt": "x", "seed": 5, "temperature": 1.0}, ["seed", "5", "CPU"]),
    "beam search": ("/v1/completions", {"prompt": "x", "use_beam_search": True, "n": 2}, ["use_beam_search"]),
}


def test_a_limit_that_cuts_nothing(server: Server) -> None:
    _, plain = server.chat(QUESTION, logprobs=True, **COT)
    status, limited = server.chat(QUESTION, logprobs=True, truncate_prompt_tokens=200, **COT)
    assert status == 200, limited
    assert limited["choices"][0]["message"] == plain["choices"][0]["message"]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_400_that_names_the_fault(server: Server, case: str) -> None:
    path, body, named = BAD[case]
    status, answer = server.post(path, **body)
    assert status == 400, answer
    for text in named:
        assert text in answer["error"]["message"]


def test_others_finish_untouched(server: Server) -> None:
    _, alone = server.chat(QUESTION, logprobs=True, **COT)
    with ThreadPoolExecutor(12) as pool:
        good = [pool.submit(server.chat, QUESTION, logprobs=True, **COT) for _ in range(4)]
        bad = [pool.submit(server.post, path, **body) for path, body, _ in BAD.values()]
        assert {future.result()[0] for future in bad} == {400}
        for future in good:
            status, body = future.result()
            assert status == 200
            ours, theirs = body["choices"][0], alone["choices"][0]
            assert ours["message"] == theirs["message"]
            for a, b in zip(ours["logprobs"]["content"], theirs["logprobs"]["content"], strict=True):
                assert abs(a["logprob"] - b["logprob"]) <= TOLERANCE
