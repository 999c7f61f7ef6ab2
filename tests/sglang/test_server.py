"""The server's contract over HTTP: names, chat, spans, and faults as 400s with the messages of the vLLM plugin."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("sglang")

from tests.sglang.engine import PATIENCE, cpu_environment

QUESTION = "Tom has 3 boxes with 4 apples each. He gives away 5 apples. How many apples are left?"


class Server:
    """`python -m sglang.launch_server --model-path hrm-text-nano` on a CPU."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = "--device cpu --dtype float32 --max-total-tokens 4096 --mem-fraction-static 0.3 --log-level error"
        command = ["-m", "sglang.launch_server", "--model-path", "hrm-text-nano", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command, "--max-running-requests", "4", *options.split()],
            env={**os.environ, **cpu_environment()},
        )

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(PATIENCE):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self.process.returncode}")
            try:
                if self.call("/v1/models")[0] == 200:
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
def server() -> Iterator[Server]:
    running = Server()
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


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"chat_template_kwargs": {"condition": "bad"}}, "condition: 'bad' is unknown"),
        ({"chat_template_kwargs": {"conditon": "cot"}}, "did you mean 'condition'?"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing to answer"),
        ({"custom_params": {"prefix_lm_spans": [0, 9999]}}, "out of range: it needs 0 <= start < end <="),
        ({"custom_params": {"prefix_lm_spans": [3, 3]}}, "span [3, 3) is empty"),
        ({"custom_params": {"prefix_lm_spans": "0,3"}}, "must be a flat list of integers"),
    ],
)
def test_a_fault_is_a_400_that_names_it(server: Server, body: dict[str, Any], message: str) -> None:
    status, answer = server.chat("What is 12 + 30?", **body)
    assert status == 400
    assert message in str(answer)
