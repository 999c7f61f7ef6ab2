"""SGLang with this plugin beside SGLang's in-tree model: decode steps, and what the radix cache saves.

    python -m benchmarks.sglang_steps --out sglang_steps.json

One run on one GPU with dummy weights of the 1B: an engine after the other, each in its own process with default
options. A step is the difference between serving a batch for 72 and for 8 tokens a request, divided
by 64, so that neither prefill nor what surrounds a request is in it. Repeated until two seconds have gone into it, and
three times at the least; the median is reported, for a hiccup in the shorter run makes a step look short.
"""

import json
import multiprocessing as mp
import os
import random
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

CONFIG = Path(__file__).parent / "hrm-text-1b"
SHAPES = ((1, 128), (8, 128), (16, 128), (32, 512), (64, 512), (256, 256))  # batch, prompt tokens
SHORT, LONG = 8, 72  # tokens a request
TURNS, TURN_TOKENS, ANSWER_TOKENS = 5, 512, 16
ENGINES: dict[str, dict[str, str]] = {
    "plugin": {"SGLANG_PLUGINS": "hrm_text"},
    "in-tree": {"SGLANG_PLUGINS": "none"},
}


def tokens(count: int) -> list[int]:
    """Random prompt tokens: no two prompts share a prefix."""
    return [random.randrange(12, 60000) for _ in range(count)]


def serve(engine: Any, prompts: list[list[int]], length: int, spans: list[int] | None = None) -> tuple[float, Any]:
    """Seconds until every prompt has `length` tokens, and the outputs."""
    params = {"temperature": 0.0, "max_new_tokens": length, "ignore_eos": True}
    if spans is not None:
        params["custom_params"] = {"prefix_lm_spans": spans}
    began = time.perf_counter()
    outputs = engine.generate(input_ids=prompts, sampling_params=params)
    return time.perf_counter() - began, outputs


def step_ms(engine: Any, batch: int, context: int) -> float:
    """Milliseconds a decode step takes for `batch` requests of `context` prompt tokens."""
    seconds = {}
    for length in (SHORT, LONG):
        seconds[length], _ = serve(engine, [tokens(context) for _ in range(batch)], length)
    return 1000 * (seconds[LONG] - seconds[SHORT]) / (LONG - SHORT)


def steps(engine: Any, shape: tuple[int, int]) -> list[float]:
    """`step_ms` of one shape, repeated."""
    began, times = time.perf_counter(), []
    while len(times) < 3 or time.perf_counter() - began < 2:
        times.append(step_ms(engine, *shape))
    return times


def repeated_prompts(engine: Any) -> dict[str, Any]:
    """Milliseconds until 32 prompts of 3,072 tokens have their first token, twice, and what the second time found."""
    prompts = [tokens(3072) for _ in range(32)]
    first, _ = serve(engine, prompts, 1)
    second, outputs = serve(engine, prompts, 1)
    return {"first_ms": 1000 * first, "again_ms": 1000 * second, "cached_tokens": cached(outputs)}


def chats(engine: Any) -> list[dict[str, Any]]:
    """Milliseconds until all of 32 chats have the first token of a turn: user turns of 512 tokens, answers of 16."""
    histories: list[list[int]] = [[] for _ in range(32)]
    spans: list[int] = []
    turns = []
    for _ in range(TURNS):
        spans += [len(histories[0]), len(histories[0]) + TURN_TOKENS]
        histories = [history + tokens(TURN_TOKENS) for history in histories]
        ttft, outputs = serve(engine, histories, 1, spans)
        _, answers = serve(engine, histories, ANSWER_TOKENS, spans)
        turns.append({"ttft_ms": 1000 * ttft, "cached_tokens": cached(outputs)})
        histories = [history + answer["output_ids"] for history, answer in zip(histories, answers, strict=True)]
    return turns


def cached(outputs: list[dict[str, Any]]) -> int:
    """Prompt tokens that each request found in the radix cache, on average."""
    return round(sum(output["meta_info"]["cached_tokens"] for output in outputs) / len(outputs))


def _measure(name: str, pipe: Any) -> None:
    os.environ.update(ENGINES[name])
    began = time.perf_counter()
    import sglang

    engine = sglang.Engine(
        model_path=str(CONFIG),
        load_format="dummy",
        skip_tokenizer_init=True,
        log_level="warning",
        mem_fraction_static=0.8,
        max_running_requests=256,
        sampling_backend="pytorch",
        cuda_graph_config={"decode": {"bs": [batch for batch, _ in SHAPES]}},
    )
    pipe.send(("startup_s", time.perf_counter() - began))
    for batch, context in SHAPES:
        serve(engine, [tokens(context) for _ in range(batch)], SHORT)  # kernels that compile on their first use
    for shape in SHAPES:
        pipe.send((shape, steps(engine, shape)))
    repeated_prompts(engine)
    pipe.send(("32 prompts of 3072 tokens, twice", repeated_prompts(engine)))
    pipe.send(("32 chats of 5 turns", chats(engine)))
    engine.shutdown()
    pipe.send(None)


def main(out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("sglang_steps.json")) -> None:
    """Measure every engine and print its steps beside the in-tree model's."""
    report: dict[str, dict[str, Any]] = {}
    for name in ENGINES:
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_measure, args=(name, theirs))
        process.start()
        theirs.close()
        report[name] = {}
        while (item := _receive(ours, name)) is not None:
            report[name][str(item[0])] = item[1]
            print(name, *item, flush=True)
            out.write_text(json.dumps(report, indent=1))
        process.join()
    for shape in map(str, SHAPES):
        step = {name: median(values[shape]) for name, values in report.items()}
        ratio = step["in-tree"] / step["plugin"]
        print(f"batch, context {shape}: { ({name: f'{ms:.2f} ms' for name, ms in step.items()}) }, {ratio:.1f} x")


def _receive(pipe: Any, name: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"benchmarks.sglang_steps: the engine {name!r} ended early; its own output says why") from None


if __name__ == "__main__":
    typer.run(main)
