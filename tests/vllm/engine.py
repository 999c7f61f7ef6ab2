"""A vLLM engine in a process of its own, driven from tests."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.engine_process import Answer, Ask, EngineProcess

DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "seed": 0,
    "dtype": "float32",
    "disable_log_stats": True,
}
FUSED_LOG = "decode runs on the fused kernels"  # what hrm_vllm.decode logs
CPU_DEFAULTS: dict[str, Any] = {"block_size": 32}
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
CPU_ENVIRONMENT = {
    # Log-prob ranks are compiled with a C++ compiler on first use: 20 s a process, no use here.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


class Engine(EngineProcess):
    """`with Engine(model=path, ...) as engine: engine.ask([Ask(...)])`.

    Args:
        sabotage: a name in `tests.vllm.sabotage`, applied before the engine starts.
        env: environment of the process, beside the inherited one.
        gpu_layout: on a CPU, the KV cache as GPUs keep it (`tests.vllm.gpu_layout`).
        log: a file for what it logs; else it logs errors only, to the test's own output.
        kwargs: of `vllm.LLM`, over `DEFAULTS`.
    """

    def __init__(
        self,
        sabotage: str | None = None,
        env: Mapping[str, str] | None = None,
        gpu_layout: bool = False,
        log: Path | None = None,
        **kwargs: Any,
    ) -> None:
        on_gpu = kwargs.pop("on_gpu", False)
        self.kwargs = DEFAULTS | ({} if on_gpu else CPU_DEFAULTS) | kwargs
        environment = ENVIRONMENT | ({} if on_gpu else CPU_ENVIRONMENT) | dict(env or {})
        if log:
            environment["VLLM_LOGGING_LEVEL"] = "INFO"
        super().__init__(_start, generate, environment, self.kwargs, sabotage, gpu_layout, log)


def _start(kwargs: dict[str, Any], sabotage: str | None, gpu_layout: bool, log: Path | None) -> Any:
    if log:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stdout.fileno())
    if gpu_layout:
        from tests.vllm import gpu_layout as stand_in

        stand_in.apply()
    if sabotage is not None:
        from vllm.plugins import load_general_plugins

        from tests.vllm import sabotage as acts

        load_general_plugins()
        getattr(acts, sabotage)()
    from vllm import LLM

    return LLM(**kwargs)


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
