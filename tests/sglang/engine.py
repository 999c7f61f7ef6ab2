"""An SGLang engine in a process of its own, driven from tests.

On a CPU, SGLang 0.5.23 needs SGLANG_USE_CPU_ENGINE=1 and stand-ins for two packages it imports and does not
call (`stubs/`). It runs its scheduler in a child process, so what a test wants to know of it (retractions)
comes back in a request's meta_info, and a sabotage is applied by an environment variable that the child reads.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hrm_text.oracle import token_logprobs
from hrm_text.spans import SPANS_OPTION, SpanRule, Spans, request_spans, scored_inside
from tests.engine_process import Answer, Ask, EngineProcess
from tests.sglang import on_cpu

ROOT = Path(__file__).resolve().parents[2]
STUBS = str(ROOT / "tests/sglang/stubs")
TOLERANCE = 1e-5
EOS = 11
FUSED_LOG = "decode runs on the fused kernels"  # what hrm_sglang.decode logs
RULE = SpanRule(envelope=None)
CPU_DEFAULTS: dict[str, Any] = {"device": "cpu"}
DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "log_level": "error",
    "sleep_on_idle": True,  # else an idle scheduler keeps a core busy
    "max_total_tokens": 2048,
    "chunked_prefill_size": 96,
    "max_running_requests": 8,
    "random_seed": 0,
    "mem_fraction_static": 0.3,
}
if STUBS not in sys.path:
    sys.path.append(STUBS)  # spawned processes take it over; an installed package goes before a stand-in


def cpu_environment() -> dict[str, str]:
    """Environment in which SGLang runs on a CPU."""
    path = os.pathsep.join([STUBS, str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "no_models",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path.rstrip(os.pathsep),
    }


class Engine(EngineProcess):
    """`with Engine(model_path=path, ...) as engine: engine.ask([Ask(...)])`.

    Args:
        on_gpu: whether it runs on a GPU, and so needs none of the stand-ins.
        env: environment of the process, beside the inherited one.
        log: a file for what it logs; else it goes to the test's own standard error.
        kwargs: of `sglang.Engine`, over `DEFAULTS`.
    """

    def __init__(
        self, on_gpu: bool = False, env: Mapping[str, str] | None = None, log: Path | None = None, **kwargs: Any
    ) -> None:
        environment = {**({} if on_gpu else cpu_environment()), **(env or {})}
        if kwargs.get("enable_lora"):
            environment[on_cpu.VARIABLE] = "1"
        super().__init__(_start, generate, environment, DEFAULTS | ({} if on_gpu else CPU_DEFAULTS) | kwargs, log)


def _start(kwargs: dict[str, Any], log: Path | None) -> Any:
    if log:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    import sglang

    return sglang.Engine(**kwargs)


_retractions = 0


def retractions(engine: Any) -> int:
    """How often requests were retracted so far."""
    return _retractions


def generate(engine: Any, asks: list[Ask], adapters: Sequence[str | None] | None = None) -> list[list[Answer]]:
    """Serve `asks` with `engine`, in its process; `adapters` are the LoRA adapters of each."""
    samples = [ask for ask in asks for _ in range(ask.n)]
    names = [name for ask, name in zip(asks, adapters, strict=True) for _ in range(ask.n)] if adapters else None
    outputs = engine.generate(
        input_ids=[list(ask.prompt) for ask in samples],
        sampling_params=[_sampling(ask) for ask in samples],
        return_logprob=[True] * len(samples),
        logprob_start_len=[ask.score_from if ask.score else -1 for ask in samples],
        lora_path=names,
    )
    global _retractions
    _retractions += sum(output["meta_info"].get("num_retractions") or 0 for output in outputs)
    answers = iter(_answer(ask, output["meta_info"]) for ask, output in zip(samples, outputs, strict=True))
    return [[next(answers) for _ in range(ask.n)] for ask in asks]


def _sampling(ask: Ask) -> dict[str, Any]:
    custom = dict(ask.options)
    if ask.spans is not None:
        custom[SPANS_OPTION] = list(ask.spans)
    return {
        "temperature": 0.0,
        "max_new_tokens": ask.max_tokens,
        "custom_params": custom or None,
        **ask.sampling,
    }


def _answer(ask: Ask, meta: Mapping[str, Any]) -> Answer:
    scored = None
    if ask.score:
        behind = [logprob for logprob, *_ in meta["input_token_logprobs"]]
        scored = (None,) * ask.score_from + tuple(behind)
        assert len(scored) == len(ask.prompt)
    return Answer(
        tokens=tuple(token for _, token, *_ in meta["output_token_logprobs"]),
        logprobs=tuple(logprob for logprob, *_ in meta["output_token_logprobs"]),
        prompt_logprobs=scored,
        cached=meta["cached_tokens"],
    )


def true_spans(ask: Ask) -> Spans:
    """Spans the request must be served with, by the core's own function."""
    return request_spans(ask.prompt, {} if ask.spans is None else {SPANS_OPTION: list(ask.spans)}, RULE)


def deviation(reference: Any, ask: Ask, answers: Sequence[Answer]) -> float:
    """Largest |log-prob - oracle's| over every emitted token and every scored prompt token."""
    worst = 0.0
    spans = true_spans(ask)
    opted_in = ask.options.get("prefix_lm_span_logprobs", False)
    for answer in answers:
        expected = token_logprobs(reference, ask.prompt + answer.tokens, spans)
        # With ignore_eos SGLang reserves every token at admission and never has to retract.
        assert len(answer.tokens) == ask.max_tokens or answer.tokens[-1] == EOS
        emitted = expected[len(ask.prompt) - 1 :]
        worst = max(worst, float((emitted - torch.tensor(answer.logprobs)).abs().max()))
        for position, logprob in enumerate(answer.prompt_logprobs or ()):
            hidden = position <= ask.score_from or (scored_inside(spans, position) and not opted_in)
            assert (logprob is None) == hidden, f"position {position} of spans {spans}"
            if logprob is not None:
                worst = max(worst, abs(float(expected[position - 1]) - logprob))
    return worst


def worst_deviation(reference: Any, engine: Engine, batch: Sequence[Ask]) -> float:
    """Serve `batch` at once; the largest deviation in it."""
    return max(deviation(reference, ask, answers) for ask, answers in zip(batch, engine.ask(batch), strict=True))


def prompt(length: int, seed: int = 7) -> tuple[int, ...]:
    """Random token ids, none of them a marker."""
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randint(244, (length,), generator=generator) + 12).tolist())
