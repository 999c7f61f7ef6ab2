"""The server's contract over HTTP: names, chat, spans, programs, and faults as 400s with the vLLM plugin's messages."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

from examples import sglang_program
from hrm_text.envelope import ChatEncoder, wrap_prompt
from hrm_text.names import nano_path
from hrm_text.oracle import load_reference, token_logprobs
from hrm_text.spans import envelope_spans
from tests.engine_process import PATIENCE
from tests.sglang.engine import TOLERANCE, cpu_environment

QUESTION = "Tom has 3 boxes with 4 apples each. He gives away 5 apples. How many apples are left?"


class Server:
    """`python -m sglang.launch_server --model-path hrm-text-nano` on a CPU."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = "--device cpu --dtype float32 --max-total-tokens 4096 --mem-fraction-static 0.3 --sleep-on-idle"
        command = ["-m", "sglang.launch_server", "--model-path", "hrm-text-nano", "--port", str(self.port)]
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *command, "--max-running-requests", "4", *options.split()],
                env={**os.environ, **cpu_environment()},
                stdout=sink,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Until it is through with warming up; `/v1/models` answers before."""
        for _ in range(PATIENCE):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self.process.returncode}:\n{self.log.read_text()}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health_generate", timeout=PATIENCE):
                    return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"no server in {PATIENCE} s")

    def call(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps({"model": "hrm-text-nano", **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def chat(self, content: str, **body: Any) -> tuple[int, dict[str, Any]]:
        return self.call(
            "/v1/chat/completions", {"temperature": 0, "messages": [{"role": "user", "content": content}], **body}
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "log")
    try:
        running.wait()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)


def test_the_name_is_the_one_that_was_typed(server: Server) -> None:
    _, models = server.call("/v1/models")
    assert [model["id"] for model in models["data"]] == ["hrm-text-nano"]


def test_a_chat_is_answered_with_the_shared_template(server: Server) -> None:
    status, answer = server.chat(QUESTION, chat_template_kwargs={"condition": "synth,cot"})
    assert status == 200
    assert answer["choices"][0]["message"]["content"].endswith(r"\boxed{7}")
    assert answer["usage"]["prompt_tokens"] == 29


def test_a_streamed_answer_is_the_same(server: Server) -> None:
    body = {"temperature": 0, "messages": [{"role": "user", "content": "What is 12 + 30?"}], "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/chat/completions",
        data=json.dumps({"model": "hrm-text-nano", **body}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        events = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: {")]
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(deltas) == server.chat("What is 12 + 30?")[1]["choices"][0]["message"]["content"] == "42"


def test_a_final_assistant_message_is_continued(server: Server) -> None:
    opened = [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "4"}]
    status, answer = server.call(
        "/v1/chat/completions", {"temperature": 0, "messages": opened, "continue_final_message": True}
    )
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "2")


def test_a_marker_in_a_message_is_text(server: Server) -> None:
    _, plain = server.chat("What is 12 + 30?")
    _, marked = server.chat("What is 12 + 30?<|im_end|>")
    assert marked["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 1


def test_raw_text_and_its_spans(server: Server) -> None:
    prompt = "<|im_start|><|object_ref_start|>What is 12 + 30?<|im_end|>"
    status, answer = server.call("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8})
    assert (status, answer["choices"][0]["text"]) == (200, "42")


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_spans_among_the_bodys_fields(server: Server, path: str) -> None:
    """As OpenAI's client puts its extra_body: the same log-probs as by custom_params, others than of other spans."""
    prompt = list(range(20, 60))

    def answer(**fields: Any) -> list[float]:
        if path == "/generate":
            params = {"temperature": 0, "max_new_tokens": 2, "custom_params": fields.pop("custom_params", None)}
            body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True, **fields}
            return [value for value, *_ in server.call(path, body)[1]["meta_info"]["output_token_logprobs"]]
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 2, "logprobs": 1, **fields}
        return server.call(path, body)[1]["choices"][0]["logprobs"]["token_logprobs"]

    options = {"prefix_lm_spans": [0, 10, 10, 25]}
    given = answer(**options)
    assert given == pytest.approx(answer(custom_params=options), abs=TOLERANCE, rel=0)
    assert given != pytest.approx(answer(custom_params={"prefix_lm_spans": []}), abs=100 * TOLERANCE, rel=0)


def test_a_missing_envelope_is_said_once(server: Server) -> None:
    said = "came without HRM-Text's envelope"
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health_generate", timeout=PATIENCE) as response:
        assert response.status == 200
    assert said not in server.log.read_text(), "SGLang's own prompts are not the user's"
    for _ in range(2):
        status, _ = server.call("/v1/completions", {"prompt": "How many?", "temperature": 0, "max_tokens": 2})
        assert status == 200
    assert server.log.read_text().count(said) == 1


def test_the_example_program_runs(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sglang_program.py", "--url", f"http://127.0.0.1:{server.port}"])
    sglang_program.main()
    assert r"\boxed{7}" in (shown := capsys.readouterr().out)
    assert "\n  B\n" in shown


def test_select_goes_by_the_oracles_logprobs(server: Server) -> None:
    """`sgl.select` scores from inside the span; what is in it comes back empty and does not count."""
    import sglang
    from transformers import AutoTokenizer

    sglang.set_default_backend(sglang.RuntimeEndpoint(f"http://127.0.0.1:{server.port}"))
    choices = ["A", "B", "red", "I think it is B."]
    meta = sglang_program.choose.run(sglang_program.QUIZ, choices).get_meta_info("choice")
    tokenizer = AutoTokenizer.from_pretrained(nano_path())
    envelope, reference = ChatEncoder.of(tokenizer).envelope, load_reference(nano_path())
    scores = zip(choices, meta["input_token_logprobs"], meta["normalized_prompt_logprobs"], strict=True)
    for choice, entries, mean in scores:
        ids = tokenizer.encode(wrap_prompt(sglang_program.QUIZ, "direct") + choice, add_special_tokens=False)
        ((_, end),) = spans = envelope_spans(ids, envelope)
        expected = token_logprobs(reference, ids, spans)[end - 1 :].tolist()
        assert [logprob for logprob, *_ in entries[: -len(expected)]] == [None, None]
        assert [token for _, token, *_ in entries[-len(expected) :]] == ids[end:]
        assert [logprob for logprob, *_ in entries[2:]] == pytest.approx(expected, abs=TOLERANCE, rel=0)
        assert mean == pytest.approx(sum(expected) / len(expected), abs=TOLERANCE, rel=0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"chat_template_kwargs": {"condition": "bad"}}, "condition: 'bad' is unknown"),
        ({"chat_template_kwargs": {"conditon": "cot"}}, "did you mean 'condition'?"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing to answer"),
        ({"custom_params": {"prefix_lm_spans": [0, 9999]}}, "out of range: it needs 0 <= start < end <="),
        ({"custom_params": {"prefix_lm_spans": [3, 3]}}, "span [3, 3) is empty"),
        ({"custom_params": {"prefix_lm_spans": "0,3"}}, "must be a flat list of integers"),
        ({"prefix_lm_spans": [0, 9999]}, "out of range: it needs 0 <= start < end <="),
        ({"prefix_lm_span": [0, 3]}, "prefix_lm_span: is unknown"),
        (
            {"prefix_lm_spans": [0, 3], "custom_params": {"prefix_lm_spans": [0, 4]}},
            "is [0, 3] in the request and [0, 4]",
        ),
    ],
)
def test_a_fault_is_a_400_that_names_it(server: Server, body: dict[str, Any], message: str) -> None:
    status, answer = server.chat("What is 12 + 30?", **body)
    assert status == 400
    assert message in str(answer)
