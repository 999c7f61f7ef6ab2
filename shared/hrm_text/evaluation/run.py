"""`hrm-text eval`: a server, lm-eval over it, and a report that grows task by task."""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hrm_text.evaluation.report import BENCHMARKS, Result, result_of, table, write
from hrm_text.evaluation.server import COMMANDS, EvalError, Server
from hrm_text.names import resolve_model
from hrm_text.output_folder import claim


@dataclass(frozen=True)
class Request:
    """What to evaluate; the fields are the command's options."""

    tasks: tuple[str, ...]
    engine: str
    model: str
    data_dir: str
    out: Path
    limit: int
    server: str
    options: tuple[str, ...] = ()

    def check(self) -> None:
        """Find what can be found before an engine starts.

        Raises:
            EvalError: a value cannot be used.
        """
        if self.engine not in COMMANDS:
            raise EvalError(f"engine: {self.engine!r} is unknown; it must be one of {', '.join(COMMANDS)}")
        if not self.tasks:
            raise EvalError(f"tasks: must name at least one of {', '.join(BENCHMARKS)}")
        for task in self.tasks:
            if task not in BENCHMARKS:
                raise EvalError(f"tasks: {task!r} is unknown; it must be one of {', '.join(BENCHMARKS)}")
        if self.data_dir and not Path(self.data_dir).is_dir():
            raise EvalError(f"data-dir: {self.data_dir} is not a folder")
        if self.limit < 0:
            raise EvalError(f"limit: must be at least 1, or 0 for all rows, got {self.limit}")
        if self.server and self.options:
            raise EvalError(f"server: {self.server} is running already, so {self.options[0]} would not reach it")


def task_folder() -> Path:
    """The YAML files: in the repository, or where the wheel puts them.

    Raises:
        EvalError: they are in neither place.
    """
    repository = Path(__file__).resolve().parents[3] / "benchmarks/lm_eval"
    for folder in (repository, Path(sys.prefix) / "share/hrm-text/lm_eval"):
        if folder.is_dir():
            return folder
    raise EvalError(f"the tasks are not at {repository}: evaluate from a checkout of the repository")


def evaluate(request: Request, console: Console) -> list[Result]:
    """Run every task that is asked for, and report.

    Raises:
        EvalError: it cannot go on; answers and results so far are in `request.out`.
    """
    request.check()
    run = {"model": request.model, "engine": request.engine, "server": request.server, "options": request.options}
    claim(request.out, run | {"server": bool(request.server)}, EvalError)
    tasks = _load(request)
    results: list[Result] = []
    with Server(request.engine, request.model, request.out / "server.log", request.server, request.options) as server:
        console.print(f"{request.engine} serves {server.name}; the plugin is active", highlight=False)
        for task, loaded in tasks.items():
            results.append(_evaluate_task(task, loaded, request, server, console))
            write(request.out, {**run, "limit": request.limit or None}, results)
    console.print(table(results))
    console.print(f"{request.out}/results.json, results.png and the answers", highlight=False)
    return results


def _load(request: Request) -> dict[str, Any]:
    """Every task's rows and prompts, before the engine starts: a bad row costs no start-up."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvalError(f"{error.name} is not installed: pip install 'hrm-text-serving[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {"pretrained": request.model} | ({"data_dir": request.data_dir} if request.data_dir else {})
    manager = TaskManager(include_path=str(task_folder()), include_defaults=False, metadata=metadata)
    try:
        return {task: manager.load([f"hrm_{task}"]) for task in request.tasks}
    except (ValueError, OSError) as error:  # a row, a file, or a model whose tokenizer cannot be found
        raise EvalError(str(error).splitlines()[0]) from error


def _evaluate_task(task: str, loaded: Any, request: Request, server: Server, console: Console) -> Result:
    from lm_eval.evaluator import evaluate as lm_evaluate
    from transformers import AutoTokenizer

    from hrm_text.evaluation.client import Ledger, ServedModel

    ledger = Ledger(request.out / f"{task}.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(request.model))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task(task, total=None)
        printed = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal printed
            bar.update(shown, completed=done, total=total)
            if not console.is_terminal and (time.monotonic() > printed + 30 or done in (0, total)):
                printed = time.monotonic()
                console.print(f"{task}: {done} of {total} answers", highlight=False)

        model = ServedModel(server, tokenizer, ledger, progress)
        try:
            results = lm_evaluate(model, loaded, limit=request.limit or None, bootstrap_iters=1000, log_samples=False)
        except EvalError as error:
            raise EvalError(
                f"{task}: {error}; {len(ledger.answers)} answers are kept in {request.out}, "
                "and the same command goes on from there"
            ) from None
    return result_of(task, results)
