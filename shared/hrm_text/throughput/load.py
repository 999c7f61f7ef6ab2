"""Putting a workload on a running engine, and reading what came of it."""

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hrm_text.evaluation.server import Server
from hrm_text.throughput.engines import BenchError
from hrm_text.throughput.workloads import Workload

LATENCIES = ("ttft", "tpot", "itl", "e2el")
STATISTICS = ("mean", "median", "p99")
# What is kept of the load generator's answer.
METRICS = (
    *("completed", "duration", "total_output_tokens", "output_throughput", "total_token_throughput"),
    "request_goodput",
    *(f"{statistic}_{latency}_ms" for latency in LATENCIES for statistic in STATISTICS),
)
SAMPLING_TEMPERATURE = 0.7  # of a majority vote


class Worker:
    """`with Worker(command, log) as worker: worker.ask(request)`: a process that answers lines of JSON with lines."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.command, self.log, self._environment = command, log, environment
        self._ready = False

    def __enter__(self) -> "Worker":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as sink:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                env=dict(self._environment),
                # An interrupt is for the command, which ends this process after keeping what it has.
                start_new_session=True,
            )
        return self

    def wait_until_ready(self) -> None:
        """Raises:
        BenchError: it died before.
        """
        if not self._ready:
            self._read()
            self._ready = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        """The leader of its session."""
        return self._process.pid

    def ask(self, request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            BenchError: the process died, or what it was asked for failed.
        """
        self.wait_until_ready()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{answer['error']}; see {self.log}")
        return answer

    def _died(self) -> BenchError:
        module = " ".join(self.command[1:3])
        return BenchError(f"{module} died (exit status {self._process.wait()}); see {self.log}")


@dataclass(frozen=True)
class Load:
    """A workload as a file of prompts.

    Attributes:
        prompts: the file.
        count: of its prompts.
        stops: whether an answer may end before its length.
        output: tokens to generate; fewer in a warm-up.
    """

    workload: Workload
    prompts: Path
    count: int
    stops: bool
    output: int


def bench_arguments(load: Load, server: Server, tokenizer: str, limits: Mapping[str, float], result: Path) -> list[str]:
    """Arguments of `vllm bench serve`; what is not here is left at its default."""
    workload = load.workload
    temperature = SAMPLING_TEMPERATURE if workload.kind == "vote" else 0
    arguments = (
        f"--backend openai --base-url {server.url} --dataset-name custom --skip-chat-template --disable-shuffle "
        f"--custom-output-len {load.output} --num-prompts {load.count} --max-concurrency {workload.concurrency} "
        f"--temperature {temperature} --percentile-metrics {','.join(LATENCIES)} --metric-percentiles 99 "
        f"--goodput {' '.join(f'{name}:{limit:g}' for name, limit in limits.items())} "
        "--disable-tqdm --save-result --save-detailed"
    ).split()
    if workload.kind == "score":
        arguments += ["--logprobs", "1", "--extra-body", '{"echo": true}']
    elif not load.stops:
        arguments.append("--ignore-eos")
    files = ["--dataset-path", str(load.prompts), "--result-dir", str(result.parent), "--result-filename", result.name]
    return [*arguments, "--model", server.name, "--tokenizer", tokenizer, *files]


def put_on_server(
    load: Load, server: Server, driver: Worker, tokenizer: str, limits: Mapping[str, float], scratch: Path
) -> tuple[str, dict[str, float]]:
    """The command line and the metrics of a load on a server.

    Raises:
        BenchError: a request failed.
        EvalError: the server died.
    """
    result = scratch / "bench.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    arguments = bench_arguments(load, server, tokenizer, limits, result)
    try:
        answer = driver.ask(arguments)
        metrics = read_metrics(load.workload.name, load.count, answer)
    except BenchError:
        server.check_alive()
        raise
    return shlex.join(["vllm", "bench", "serve", *arguments]), metrics


def put_on_transformers(load: Load, worker: Worker, limits: Mapping[str, float]) -> tuple[str, dict[str, float]]:
    """The request and the metrics of a load on transformers."""
    request = {
        "prompts": str(load.prompts),
        "output": load.output,
        "batch": load.workload.concurrency,
        "ignore_eos": not load.stops,
        "score": load.workload.kind == "score",
        "limits": dict(limits),
    }
    return json.dumps(request), read_metrics(load.workload.name, load.count, worker.ask(request))


def read_metrics(workload: str, count: int, answer: Mapping[str, Any]) -> dict[str, float]:
    """What is kept of an answer.

    Raises:
        BenchError: a request failed, or a metric is missing.
    """
    if answer.get("failed") or answer.get("completed") != count:
        errors = [str(error).strip().splitlines()[-1] for error in answer.get("errors", []) if error]
        why = f": {errors[0]}" if errors else ""
        raise BenchError(f"{workload}: {count - answer.get('completed', 0)} of {count} requests failed{why}")
    missing = [name for name in METRICS if answer.get(name) is None]
    if missing:
        raise BenchError(f"{workload}: the load generator gave no {missing[0]}")
    return {name: float(answer[name]) for name in METRICS}
