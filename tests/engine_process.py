"""An engine in a process of its own, driven from tests through a pipe; what a test asks, and what comes back.

One engine a process: the engines keep process-wide state, and a negative control has to sabotage a hook before
its engine starts without touching anyone else's.
"""

import contextlib
import multiprocessing as mp
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

PATIENCE = 240  # seconds until an engine that gives no answer is taken to hang
INTERPRETED_PATIENCE = 900  # of one whose kernels Triton interprets: a batch takes minutes beside other tests


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: token ids.
        spans: flat `prefix_lm_spans`, or None to leave it to the rules.
        score: also return prompt log-probs.
        options: further `extra_args` (SGLang: `custom_params`).
        sampling: further fields of the sampling parameters.
        score_from: only prompt log-probs behind this position (SGLang's `logprob_start_len`).
    """

    prompt: tuple[int, ...]
    spans: tuple[int, ...] | None = None
    max_tokens: int = 4
    n: int = 1
    score: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    score_from: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back for one sample of one request.

    Attributes:
        tokens: generated ids.
        logprobs: of each generated id.
        prompt_logprobs: of each prompt id; None where the engine gives none.
        cached: prompt tokens served from the prefix cache.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float | None, ...] | None
    cached: int


class EngineProcess:
    """`with EngineProcess(...) as engine: engine.ask([Ask(...)])`.

    Args:
        start: makes the engine from `args`, in its process.
        generate: serves a batch of asks with it, there.
        env: environment of the process, beside the inherited one.
    """

    def __init__(
        self,
        start: Callable[..., Any],
        generate: Callable[[Any, list[Ask]], list[list[Answer]]],
        env: Mapping[str, str],
        *args: Any,
    ) -> None:
        self._patience = INTERPRETED_PATIENCE if "TRITON_INTERPRET" in env else PATIENCE
        before = {key: os.environ.get(key) for key in env}
        os.environ.update(env)
        try:
            context = mp.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, start, generate, args), daemon=False)
            self._process.start()
            theirs.close()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})

    def __enter__(self) -> Self:
        self._receive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(("stop", None))
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, asks: Sequence[Ask]) -> list[list[Answer]]:
        """Serve `asks` as one batch; the samples of each."""
        self._pipe.send(("ask", list(asks)))
        return self._receive()

    def call(self, function: Any, *args: Any) -> Any:
        """`function(engine, *args)` in the engine's process; it must be importable there."""
        self._pipe.send(("call", (function, args)))
        return self._receive()

    def _receive(self) -> Any:
        if not self._pipe.poll(self._patience):
            self._process.kill()
            raise RuntimeError(f"the engine gave no answer in {self._patience} s: a request waits for ever")
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            raise RuntimeError(f"engine process ended with code {self._process.exitcode}") from None
        if kind == "error":
            error, trace = value
            error.add_note(trace)
            raise error
        return value


def _serve(pipe: Any, start: Callable[..., Any], generate: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        engine = start(*args)
        pipe.send(("ready", None))
    except BaseException as error:
        pipe.send(("error", (RuntimeError(f"{type(error).__name__}: {error}"), traceback.format_exc())))
        return
    while True:
        kind, value = pipe.recv()
        if kind == "stop":
            getattr(engine, "shutdown", lambda: None)()  # SGLang's has processes of its own
            return
        try:
            result = generate(engine, value) if kind == "ask" else value[0](engine, *value[1])
            pipe.send(("result", result))
        except Exception as error:
            fault = ValueError if isinstance(error, ValueError) else RuntimeError
            text = str(error) if fault is ValueError else f"{type(error).__name__}: {error}"
            pipe.send(("error", (fault(text), traceback.format_exc())))
