"""Decode step times and prefill: vLLM with this plugin beside vLLM's in-tree model, in one run on one GPU.

    python -m benchmarks.step_time --out step_time.json

Both engines are loaded at once, each in its own process with the same KV cache, default options and
dummy weights of the 1B, and measured in turn. A step is the wall time between the point
where every request of the batch has two tokens and 128 steps later (32 where the KV cache holds no more), divided
by that number; the smallest of the repeats is reported with their spread. Prefill is 64 prompts of 2,048 tokens
until each has its first token; the fastest of the repeats.
"""

import json
import multiprocessing as mp
import os
import random
import time
from pathlib import Path
from typing import Annotated, Any

import typer

CONFIG = Path(__file__).parent / "hrm-text-1b"
SHAPES = (
    (1, 128, 128),
    (8, 128, 128),
    (16, 128, 128),
    (32, 512, 128),
    (64, 512, 128),
    (256, 256, 32),
)  # batch, prompt tokens, steps
PREFILL = (64, 2048)  # requests, prompt tokens
KV_BYTES = 58 << 30  # 79,000 tokens of the 1B: every shape runs as one batch
ENGINES = {"in-tree": {"VLLM_PLUGINS": ""}, "plugin": {"VLLM_PLUGINS": "hrm_text"}}


def measure(llm: Any, batch: int, context: int, steps: int) -> float:
    """Milliseconds that each of `steps` decode steps takes for `batch` requests of `context` prompt tokens."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=steps + 40, ignore_eos=True, detokenize=False)
    engine = llm.llm_engine
    add(engine, batch, context, params)
    lengths: dict[str, int] = {}
    began = 0.0
    while engine.has_unfinished_requests():
        for output in engine.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)
        shortest = min(lengths.values()) if len(lengths) == batch else 0
        if shortest and max(lengths.values()) >= steps + 40:
            raise RuntimeError("the batch does not fit the KV cache at once: its requests ran in waves")
        if not began and shortest >= 2:
            began, first = time.perf_counter(), shortest
        elif began and shortest >= first + steps:
            elapsed = time.perf_counter() - began
            engine.abort_request(list(lengths))
            while engine.has_unfinished_requests():
                engine.step()
            return 1000 * elapsed / (shortest - first)
    raise RuntimeError("the batch ended before it was measured")


def prefill(llm: Any) -> float:
    """Prompt tokens a second, until every request has its first token."""
    from vllm import SamplingParams

    engine, (batch, context) = llm.llm_engine, PREFILL
    add(engine, batch, context, SamplingParams(temperature=0.0, max_tokens=1, detokenize=False))
    began = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
    return batch * context / (time.perf_counter() - began)


def add(engine: Any, batch: int, context: int, params: Any) -> None:
    """Requests of random tokens, so that no two share a prefix."""
    for index in range(batch):
        prompt = [random.randrange(12, 60000) for _ in range(context)]
        engine.add_request(f"{time.monotonic_ns()}-{index}", {"prompt_token_ids": prompt}, params)


def _serve(pipe: Any, env: dict[str, str]) -> None:
    os.environ.update(env, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")
    began = time.perf_counter()
    from vllm import LLM

    llm = LLM(
        str(CONFIG),
        load_format="dummy",
        skip_tokenizer_init=True,
        # Not a share of what is free: two engines that start together count each other's memory.
        kv_cache_memory_bytes=KV_BYTES,
        gpu_memory_utilization=0.4,
        max_num_seqs=256,
        attention_backend="FLASH_ATTN",
        compilation_config={"cudagraph_capture_sizes": sorted({batch for batch, _, _ in SHAPES})},
        disable_log_stats=True,
    )
    pipe.send(time.perf_counter() - began)
    while (wanted := pipe.recv()) is not None:
        pipe.send(prefill(llm) if wanted == PREFILL else measure(llm, *wanted))


def main(out: Annotated[Path, typer.Option(help="Where the JSON goes.")], repeats: int = 3) -> None:
    """Measure every shape on both engines in turn and print the ratios."""
    context = mp.get_context("spawn")
    pipes: dict[str, Any] = {}
    report: dict[str, Any] = {"startup_s": {}, "steps": []}
    processes = []
    for name, env in ENGINES.items():
        pipes[name], theirs = context.Pipe()
        # Not daemonic ones, which may have no processes of their own, as vLLM and the plugin have.
        processes.append(context.Process(target=_serve, args=(theirs, env)))
        processes[-1].start()
        theirs.close()
    try:
        compare(pipes, report, out, repeats)
    finally:
        for process in processes:
            process.terminate()


def compare(pipes: dict[str, Any], report: dict[str, Any], out: Path, repeats: int) -> None:
    """Fill `report`, and the file that holds it.

    Raises:
        EOFError: an engine ended.
    """
    for name, pipe in pipes.items():
        report["startup_s"][name] = pipe.recv()
    for shape in SHAPES:
        times = in_turn(pipes, shape, repeats)
        best = {name: min(values[1:]) for name, values in times.items()}
        ratio = best["plugin"] / best["in-tree"]
        report["steps"].append({"batch": shape[0], "context": shape[1], "ms": times, "ratio": ratio})
        print(f"batch {shape[0]:4d} context {shape[1]:4d}: {best} ratio {ratio:.3f}", flush=True)
        out.write_text(json.dumps(report, indent=1))
    rates = in_turn(pipes, PREFILL, repeats)
    most = {name: max(values[1:]) for name, values in rates.items()}
    ratio = most["plugin"] / most["in-tree"]
    report["prefill"] = {"requests": PREFILL[0], "prompt": PREFILL[1], "tokens_per_s": rates, "ratio": ratio}
    print(f"prefill {PREFILL[0]} x {PREFILL[1]}, tokens/s: {most} ratio {ratio:.3f}", flush=True)
    out.write_text(json.dumps(report, indent=1))
    for pipe in pipes.values():
        pipe.send(None)
    print(json.dumps(report["startup_s"]))


def in_turn(pipes: dict[str, Any], wanted: tuple[int, ...], repeats: int) -> dict[str, list[float]]:
    """What each engine measures, one after the other, and again."""
    found: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(repeats):
        for name, pipe in pipes.items():
            pipe.send(wanted)
            found[name].append(pipe.recv())
    return found


if __name__ == "__main__":
    typer.run(main)
