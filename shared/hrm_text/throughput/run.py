"""`hrm-text bench`: every engine in turn under every workload, the order alternating from repeat to repeat."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hrm_text.config import HrmTextShape, read_config
from hrm_text.names import resolve_model
from hrm_text.output_folder import claim, write_json
from hrm_text.throughput.dummy import dummy_model
from hrm_text.throughput.engines import (
    ENGINES,
    BenchError,
    check_load_generator,
    find_machine,
    kv_tokens,
    memory_mib,
    versions,
)
from hrm_text.throughput.floor import Costs, Rates
from hrm_text.throughput.load import Load, Worker, put_on_server, put_on_transformers
from hrm_text.throughput.report import Report
from hrm_text.throughput.results import Record, Store
from hrm_text.throughput.tasks import WARM_TOKENS, Task, make_task
from hrm_text.throughput.workloads import SIZES, WorkloadError


@dataclass(frozen=True)
class Request:
    """What to measure; the fields are the command's options."""

    engines: tuple[str, ...]
    workloads: tuple[str, ...]
    model: str
    size: str
    dummy: bool
    data_dir: str
    repeats: int
    out: Path
    pythons: dict[str, str]

    def check(self) -> None:
        """Find what can be found before an engine starts.

        Raises:
            BenchError: a value cannot be used.
        """
        if self.size not in SIZES:
            raise BenchError(f"size: {self.size!r} is unknown; it must be one of {', '.join(SIZES)}")
        names = [workload.name for workload in SIZES[self.size].workloads]
        for field, given, known in (("engines", self.engines, ENGINES), ("workloads", self.workloads, names)):
            for name in given:
                if name not in known:
                    raise BenchError(f"{field}: {name!r} is unknown; it must be one of {', '.join(known)}")
        if self.repeats < 0:
            raise BenchError(f"repeats: must be at least 1, or 0 for the size's own, got {self.repeats}")
        if self.data_dir and not Path(self.data_dir).is_dir():
            raise BenchError(f"data-dir: {self.data_dir} is not a folder")


class Bench:
    """One run over one output folder."""

    def __init__(self, request: Request, console: Console) -> None:
        request.check()
        if importlib.util.find_spec("matplotlib") is None:
            raise BenchError("matplotlib is not installed: pip install 'hrm-text-serving[eval]'")
        self.request, self.console = request, console
        self.size = SIZES[request.size]
        self.machine = find_machine(request.pythons)
        self.engines = self._engines()
        try:
            self.model = dummy_model(request.model, request.out) if request.dummy else resolve_model(request.model)
            self.shape, self.tokenizer = _read_model(self.model)
        except (OSError, ValueError) as error:
            raise BenchError(f"model: {(str(error).splitlines() or [''])[0]}") from None
        claim(request.out, {"model": request.model, "size": request.size, "dummy": request.dummy}, BenchError)
        self.store = Store(request.out)
        self.tasks = self._tasks()
        self._driver: Worker | None = None

    def run(self) -> Report:
        """Measure what is not there yet, and report.

        Raises:
            BenchError, EvalError: it cannot go on; the results so far are in the output folder.
        """
        with ExitStack() as self._exits:
            return self._run()

    def _run(self) -> Report:
        report = self._report()
        repeats = self.request.repeats or self.size.repeats
        for repeat in range(repeats):
            for engine in self.engines if repeat % 2 == 0 else self.engines[::-1]:
                missing = [t for t in self.tasks if self._is_missing(engine, t.workload.name, repeat)]
                if missing:
                    self._visit(engine, repeat, missing)
                    report.write()
        report.write()
        return report

    def _is_missing(self, engine: str, workload: str, repeat: int) -> bool:
        asked = not self.request.workloads or workload in self.request.workloads
        return asked and (engine, workload, repeat) not in self.store.records

    def _engines(self) -> list[str]:
        asked = list(self.request.engines)
        reasons = {engine: self.machine.why_missing(engine) for engine in asked or ENGINES}
        for engine, reason in reasons.items():
            if reason and asked:
                raise BenchError(f"engines: {engine} cannot be measured here: {reason}")
            if reason:
                self._say(f"left out: {engine}: {reason}")
        found = [engine for engine, reason in reasons.items() if not reason]
        if any(ENGINES[engine].package != "transformers" for engine in found):
            check_load_generator(self.machine)
        return found

    def _tasks(self) -> list[Task]:
        """What is asked for, and what the folder has results of: a report is of all of them."""
        asked, tasks = self.request.workloads, []
        kept = {workload for _, workload, _ in self.store.records}
        for workload in self.size.workloads:
            if asked and workload.name not in asked and workload.name not in kept:
                continue
            try:
                task = make_task(workload, self.tokenizer, self.shape.max_positions, self.request.data_dir)
            except WorkloadError as error:
                if workload.name in asked:
                    raise BenchError(str(error)) from None
                self._say(f"left out: {error}")
                continue
            except ValueError as error:  # a row, or a prompt that does not fit
                raise BenchError(str(error)) from None
            if left_out := task.prompts.left_out:
                self._say(f"{workload.name}: {left_out} of {left_out + len(task.prompts.texts)} prompts do not fit")
            tasks.append(task)
        return tasks

    def _load(self, task: Task, warm: bool = False) -> Load:
        """The task as a file, or its warm-up."""
        workload, prompts, output = task.workload, task.prompts, task.workload.generated
        name = workload.name
        if warm:
            prompts, output, name = task.warm_up, min(output, WARM_TOKENS), f"{name}.warm"
        path = (self.request.out / "prompts" / f"{name}.jsonl").resolve()
        prompts.write(path)
        return Load(workload, path, len(prompts.texts), workload.given and not self.request.dummy, output)

    def _report(self) -> Report:
        costs = Costs(self.shape, self._rates())
        return Report(
            self.request.out,
            {
                "model": self.request.model,
                "size": self.request.size,
                "dummy": self.request.dummy,
                "limits_ms": self.size.limits,
                "command": shlex.join(sys.argv),
                "versions": {package: versions(python) for package, python in self.machine.pythons.items()},
            },
            self.store,
            [engine for engine in ENGINES if engine in self.engines or self.store.of(engine)],
            {task.workload.name: (task.workload, task.prompts) for task in self.tasks},
            costs,
        )

    def _rates(self) -> Rates:
        path = self.request.out / "rates.json"
        if not path.exists():
            self._say("measuring this machine's bandwidth and matmul rate")
            python = self.machine.pythons[ENGINES[self.engines[0]].package]
            size = Costs(self.shape, Rates(1, 1)).held_bytes
            command = [python, "-m", "hrm_text.throughput.rates", str(size)]
            measured = subprocess.run(command, capture_output=True, text=True)
            if measured.returncode:
                raise BenchError(f"the machine's rates: {(measured.stderr.splitlines() or ['no answer'])[-1]}")
            write_json(path, json.loads(measured.stdout.splitlines()[-1]))
        return Rates(**json.loads(path.read_text()))

    def _visit(self, engine: str, repeat: int, tasks: list[Task]) -> None:
        """Start an engine, measure it, and stop it."""
        began = time.monotonic()
        self._say(f"{engine}, repeat {repeat + 1}: starting")
        with self._started(engine) as started:
            self._say(f"{engine}: started in {started.seconds:.0f} s")
            for task in tasks:
                started.put(self._load(task, warm=True))
                command, metrics = started.put(self._load(task))
                log = self.request.out / "logs" / f"{engine}.log"
                record = Record(
                    engine,
                    task.workload.name,
                    repeat,
                    command,
                    started.command,
                    metrics,
                    started.seconds,
                    memory_mib(started.pid, self.machine.gpu),
                    kv_tokens(ENGINES[engine].package, log),
                )
                self.store.add(record)
                self._say(
                    f"{engine}: {task.workload.name}: {metrics['output_throughput']:.1f} output tokens/s, "
                    f"TTFT {metrics['median_ttft_ms']:.1f} ms, TPOT {metrics['median_tpot_ms']:.2f} ms"
                )
        self._say(f"{engine}: done in {time.monotonic() - began:.0f} s")

    @contextmanager
    def _started(self, engine: str) -> Iterator["_Started"]:
        log = self.request.out / "logs" / f"{engine}.log"
        environment = {**os.environ, **self.machine.environment(engine)}
        if engine == "transformers":
            command = [self.machine.pythons[engine], "-m", "hrm_text.throughput.static", self.model]
            command += ["--dummy"] if self.request.dummy else []
            began = time.monotonic()
            with Worker(command, log, environment) as worker:
                worker.wait_until_ready()
                seconds = time.monotonic() - began
                put = lambda load: put_on_transformers(load, worker, self.size.limits)  # noqa: E731
                yield _Started(seconds, worker.pid, shlex.join(command), put)
            return
        options = ["--load-format", "dummy"] if self.request.dummy else []
        options += self.size.vllm_options if ENGINES[engine].package == "vllm" else ()
        server = self.machine.server(engine, self.model, options, log)
        scratch = (self.request.out / "scratch").resolve()
        driver = self._driving()
        with server:
            assert server.pid is not None
            put = lambda load: put_on_server(load, server, driver, self.model, self.size.limits, scratch)  # noqa: E731
            yield _Started(server.start_seconds, server.pid, shlex.join(server.command), put)

    def _driving(self) -> Worker:
        """The load generator: one process for all servers, ready before their start-up is measured."""
        if self._driver is None:
            command = [self.machine.pythons["vllm"], "-m", "hrm_text.throughput.drive"]
            worker = Worker(command, self.request.out / "logs" / "drive.log", os.environ)
            self._driver = self._exits.enter_context(worker)
            self._driver.wait_until_ready()
        return self._driver

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Started:
    seconds: float
    pid: int
    command: str
    put: Any


def _read_model(model: str) -> tuple[HrmTextShape, Any]:
    from transformers import AutoConfig, AutoTokenizer

    return read_config(AutoConfig.from_pretrained(model).to_dict()), AutoTokenizer.from_pretrained(model)


def bench(request: Request, console: Console) -> None:
    """Measure and report.

    Raises:
        BenchError, EvalError: it cannot go on.
    """
    report = Bench(request, console).run()
    # As it stands in results.md: a terminal is too narrow for the table to be laid out.
    console.print(report.markdown(), markup=False, highlight=False, soft_wrap=True)
    files = ", ".join(path.name for path in report.files)
    console.print(f"{request.out}: {files}", highlight=False, soft_wrap=True)
