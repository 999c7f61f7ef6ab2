"""A vLLM engine in a process of its own, driven from tests.

One engine a process: vLLM keeps process-wide state, and a negative control has to sabotage a hook
before the engine starts without touching anyone else's.
"""

import contextlib
import multiprocessing as mp
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: token ids.
        spans: flat `prefix_lm_spans`, or None to leave it to the rules.
        score: also return prompt log-probs.
        options: further `extra_args`.
        sampling: further SamplingParams fields.
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


DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "seed": 0,
    "dtype": "float32",
    "disable_log_stats": True,
}
CPU_DEFAULTS: dict[str, Any] = {"block_size": 32}
PATIENCE = 180  # seconds until an engine that gives no answer is taken to hang


class Engine:
    """`with Engine(model=path, ...) as engine: engine.ask([Ask(...)])`.

    Args:
        sabotage: a name in `tests.vllm.sabotage`, applied before the engine starts.
        env: environment of the process, beside the inherited one.
        kwargs: of `vllm.LLM`, over `DEFAULTS`.
    """

    def __init__(self, sabotage: str | None = None, env: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        on_gpu = kwargs.pop("on_gpu", False)
        self.kwargs = DEFAULTS | ({} if on_gpu else CPU_DEFAULTS) | kwargs
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            # Log-prob ranks are compiled with a C++ compiler on first use: 20 s a process, no use here.
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }
        if on_gpu:
            environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self.kwargs, {**environment, **(env or {})}, sabotage), daemon=False
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Engine":
        self._receive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(("stop", None))
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, asks: Sequence[Ask]) -> list[list[Answer]]:
        """Serve `asks` as one batch; the samples of each."""
        self._pipe.send(("ask", list(asks)))
        return self._receive()

    def call(self, function: Any, *args: Any) -> Any:
        """`function(llm, *args)` in the engine's process; it must be importable there."""
        self._pipe.send(("call", (function, args)))
        return self._receive()

    def _receive(self) -> Any:
        if not self._pipe.poll(PATIENCE):
            self._process.kill()
            raise RuntimeError(f"the engine gave no answer in {PATIENCE} s: a request waits for ever")
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


def _serve(pipe: Any, kwargs: dict[str, Any], env: dict[str, str], sabotage: str | None) -> None:
    os.environ.update(env)
    try:
        if sabotage is not None:
            from vllm.plugins import load_general_plugins

            from tests.vllm import sabotage as acts

            load_general_plugins()
            getattr(acts, sabotage)()
        from vllm import LLM

        llm = LLM(**kwargs)
        pipe.send(("ready", None))
    except BaseException as error:
        pipe.send(("error", (RuntimeError(f"{type(error).__name__}: {error}"), traceback.format_exc())))
        return
    while True:
        kind, value = pipe.recv()
        if kind == "stop":
            return
        try:
            if kind == "ask":
                result = generate(llm, value)
            else:
                function, args = value
                result = function(llm, *args)
            pipe.send(("result", result))
        except Exception as error:
            wrapped = error if isinstance(error, ValueError) else RuntimeError(f"{type(error).__name__}: {error}")
            pipe.send(("error", (ValueError(str(wrapped)) if wrapped is error else wrapped, traceback.format_exc())))


def generate(llm: Any, asks: list[Ask], lora: Any = None) -> list[list[Answer]]:
    """Serve `asks` with `llm`, in its process."""
    from vllm import SamplingParams

    params = []
    for ask in asks:
        extra = dict(ask.options)
        if ask.spans is not None:
            extra["prefix_lm_spans"] = list(ask.spans)
        fields = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, **ask.sampling}
        params.append(
            SamplingParams(
                max_tokens=ask.max_tokens,
                n=ask.n,
                logprobs=0,
                prompt_logprobs=0 if ask.score else None,
                extra_args=extra or None,
                **fields,
            )
        )
    prompts = [{"prompt_token_ids": list(ask.prompt)} for ask in asks]
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
    return [_answers(ask, output) for ask, output in zip(asks, outputs, strict=True)]


def _answers(ask: Ask, output: Any) -> list[Answer]:
    prompt_logprobs = None
    if ask.score:
        prompt_logprobs = tuple(
            None if entry is None else entry[token].logprob
            for token, entry in zip(ask.prompt, output.prompt_logprobs, strict=True)
        )
    return [
        Answer(
            tokens=tuple(sample.token_ids),
            logprobs=tuple(entry[t].logprob for entry, t in zip(sample.logprobs, sample.token_ids, strict=True)),
            prompt_logprobs=prompt_logprobs,
            cached=output.num_cached_tokens or 0,
        )
        for sample in output.outputs
    ]
