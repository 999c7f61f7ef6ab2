"""The engine that is evaluated: a server started for the run, or one that is running already."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hrm_text.spans import SPANS_OPTION

START_SECONDS = 1800  # a first start on a GPU downloads weights and compiles
ANSWER_SECONDS = 3600
# Each engine's server, and the field that carries a request's own options.
COMMANDS = {
    "vllm": ["-m", "vllm.entrypoints.cli.main", "serve", "--model"],
    "sglang": ["-m", "sglang.launch_server", "--model-path"],
}
OPTIONS_FIELDS = {"vllm": "vllm_xargs", "sglang": "custom_params"}


class EvalError(Exception):
    """The evaluation cannot go on; the message is one line that says why."""


class Server:
    """`with Server("vllm", url=…) as server: server.post(path, body)`; without `url` one is started.

    Args:
        engine: a name in `COMMANDS`.
        model: name, folder or Hub id.
        log: file for what a started server prints.
        url: of a running server.
        options: further arguments for a started server.
        python: interpreter of the environment that has the engine.
        environment: variables for a started server, beside the inherited ones.
        plugin: whether the model must be this package's; without, it must be the engine's own.
    """

    def __init__(
        self,
        engine: str,
        model: str,
        log: Path,
        url: str = "",
        options: Sequence[str] = (),
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        plugin: bool = True,
    ) -> None:
        self.engine, self.log, self.url = engine, log, url.rstrip("/").removesuffix("/v1")
        self._process: subprocess.Popen[bytes] | None = None
        if not url:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            self.url = f"http://127.0.0.1:{port}"
            self._command = [python, *COMMANDS[engine], model, "--host", "127.0.0.1", "--port", port, *options]
        self._environment, self._plugin = dict(environment or {}), plugin
        self.start_seconds = 0.0
        self.name = ""

    def __enter__(self) -> "Server":
        try:
            if not self.url_is_given:
                self._start()
            self.name = self._model_name()
            self._check_plugin()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def url_is_given(self) -> bool:
        """Whether the server was running before."""
        return not hasattr(self, "_command")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The decoded answer to a POST.

        Raises:
            EvalError: the server died, or refused the request.
        """
        status, answer = self._call(path, body)
        if status != 200:
            raise EvalError(f"the server answered {path} with {status}: {_first_line(answer)}")
        decoded: dict[str, Any] = json.loads(answer)
        return decoded

    def _call(self, path: str, body: dict[str, Any] | None = None, patience: float = ANSWER_SECONDS) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=patience) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except (OSError, ValueError) as error:
            raise EvalError(self._why_silent(error)) from None

    @property
    def command(self) -> list[str]:
        """The command line of a started server."""
        return self._command

    @property
    def pid(self) -> int | None:
        """The leader of a started server's session."""
        return self._process.pid if self._process else None

    def check_alive(self) -> None:
        """Raises:
        EvalError: the started server has ended.
        """
        if self._process is not None and (code := self._process.poll()) is not None:
            raise EvalError(f"the {self.engine} server died (exit status {code}); see {self.log}")

    def _why_silent(self, error: Exception) -> str:
        if self._process is None:
            return f"no answer from the server at {self.url} ({error})"
        try:  # its socket may close before its process is gone
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return f"the {self.engine} server does not answer ({error}); see {self.log}"
        return f"the {self.engine} server died (exit status {code}); see {self.log}"

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        # GiB; only vLLM's CPU build reads it
        environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, **self._environment}
        with self.log.open("wb") as sink:
            # A session of its own: an interrupt reaches it only after the answers so far are kept.
            self._process = subprocess.Popen(
                self._command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise EvalError(f"the {self.engine} server did not start (exit status {code}); see {self.log}")
            try:
                with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5):
                    self.start_seconds = time.monotonic() - began
                    return
            except OSError:
                time.sleep(1)
        raise EvalError(f"the {self.engine} server did not start within {START_SECONDS} s; see {self.log}")

    def _stop(self) -> None:
        if self._process is None:
            return
        for number, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(patience)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _model_name(self) -> str:
        status, answer = self._call("/v1/models", patience=30)
        if status != 200:
            raise EvalError(f"{self.url}/v1/models answered {status}: is that an OpenAI-compatible server?")
        return str(json.loads(answer)["data"][0]["id"])

    def _check_plugin(self) -> None:
        """An empty span is an error that only this package's plugin finds."""
        options = {OPTIONS_FIELDS[self.engine]: {SPANS_OPTION: [1, 1]}}
        body = {"model": self.name, "prompt": [6, 7], "max_tokens": 1, **options}
        status, answer = self._call("/v1/completions", body, patience=300)
        found = status == 400 and SPANS_OPTION in answer
        if found and not self._plugin:
            raise EvalError(f"the {self.engine} server at {self.url} serves {self.name!r} with this package's plugin")
        if self._plugin and not found:
            raise EvalError(
                f"the {self.engine} server at {self.url} serves {self.name!r} without this package's plugin: "
                f"it answered an empty span with {status}, not with 400"
            )


def _first_line(answer: str) -> str:
    try:
        decoded = json.loads(answer)
        message = (decoded.get("error") or decoded).get("message", answer)
    except (ValueError, AttributeError):
        message = answer
    return (str(message).splitlines() or [""])[0][:300]
