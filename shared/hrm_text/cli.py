"""The `hrm-text` command."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hrm_text.doctor import DoctorError, Finding
from hrm_text.names import HRM_TEXT_1B, NANO

app = typer.Typer(no_args_is_help=True, add_completion=False, help="HRM-Text in vLLM and SGLang.")
ENGINES = {"vllm": "hrm_vllm.doctor", "sglang": "hrm_sglang.doctor"}


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Model name, folder or Hub id.")] = NANO,
    engine: Annotated[str, typer.Option(help="vllm or sglang; by default whichever is installed.")] = "",
) -> None:
    """Check that the plugin is active, and say what it would serve and how. Exit status 1 if it is not."""
    console = Console()
    try:
        findings = _diagnose(engine or _installed_engine(), model)
    except DoctorError as error:
        console.print(f"[red]not active:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    table = Table(show_header=False, box=None)
    for finding in findings:
        table.add_row(finding.topic, finding.value)
    console.print(table)
    console.print("[green]active[/green]")


@app.command("eval")
def evaluate(
    tasks: Annotated[str, typer.Option(help="Names joined by commas; an unknown one lists them all.")] = (
        "mmlu,arc_challenge,drop,gsm8k,math,hellaswag,winogrande,boolq"
    ),
    engine: Annotated[str, typer.Option(help="vllm or sglang.")] = "vllm",
    model: Annotated[str, typer.Option(help="Model name, folder or Hub id.")] = HRM_TEXT_1B,
    data_dir: Annotated[str, typer.Option(help="Folder of JSONL files, instead of the Hub.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for answers and report; a second run goes on there.")] = Path(
        "eval"
    ),
    limit: Annotated[int, typer.Option(help="Rows of each task, and of each subject; 0 for all.")] = 0,
    server: Annotated[str, typer.Option(help="URL of a running server, instead of one for this run.")] = "",
    options: Annotated[list[str] | None, typer.Argument(help="After --: further arguments of the server.")] = None,
) -> None:
    """Evaluate a model by the paper's protocol. Ends in a table, a JSON file and a plot; exit status 1 if it cannot."""
    from hrm_text.evaluation.run import Request, evaluate
    from hrm_text.evaluation.server import EvalError

    # One bar of ours, not one of lm-eval's for each subject; tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    console = Console()
    request = Request(_names(tasks), engine, model, data_dir, out, limit, server, tuple(options or ()))
    with _reporting("eval", f"answers so far are in {out}", console, DoctorError, EvalError):
        request.check()
        if not server:
            _diagnose(engine, model)
        evaluate(request, console)


@app.command()
def bench(
    engines: Annotated[str, typer.Option(help="Names joined by commas; by default all that are installed.")] = "",
    workloads: Annotated[str, typer.Option(help="Names joined by commas; by default all of the size.")] = "",
    model: Annotated[str, typer.Option(help="Model name, folder or Hub id.")] = NANO,
    size: Annotated[str, typer.Option(help="full, or smoke for a few minutes on a CPU.")] = "smoke",
    dummy: Annotated[
        bool, typer.Option("--dummy", help="Random weights: the model may be a config.json alone.")
    ] = False,
    data_dir: Annotated[str, typer.Option(help="Folder with gsm8k_test.jsonl.")] = "",
    repeats: Annotated[int, typer.Option(help="Starts of each engine; 0 for the size's own number.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results; a second run goes on there.")] = Path("bench"),
    vllm_python: Annotated[str, typer.Option(help="Interpreter with vLLM, instead of the one found.")] = "",
    sglang_python: Annotated[str, typer.Option(help="Interpreter with SGLang, instead of the one found.")] = "",
) -> None:
    """Measure the engines side by side, in-tree and with the plugin. Ends in tables, a JSON file and plots."""
    from hrm_text.evaluation.server import EvalError
    from hrm_text.throughput.engines import BenchError
    from hrm_text.throughput.run import Request, bench

    console = Console()
    pythons = {"vllm": vllm_python, "sglang": sglang_python}
    request = Request(_names(engines), _names(workloads), model, size, dummy, data_dir, repeats, out, pythons)
    with _reporting("bench", f"results so far are in {out}", console, BenchError, EvalError):
        bench(request, console)


@contextmanager
def _reporting(command: str, kept: str, console: Console, *errors: type[Exception]) -> Iterator[None]:
    """One line and an exit status for `errors` and for an interruption, after which `kept` says what is left."""
    # Whoever ends this command also ends the engine that it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except errors as error:
        console.print(f"[red]{command}:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        said = f"{command}: interrupted; {kept}, and the same command goes on from there"
        console.print(said, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def _names(joined: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in joined.split(","))))


def _installed_engine() -> str:
    for name in ENGINES:
        if importlib.util.find_spec(name) is not None:
            return name
    raise DoctorError("neither vllm nor sglang is installed in this environment")


def _diagnose(engine: str, model: str) -> list[Finding]:
    if engine not in ENGINES:
        raise DoctorError(f"engine {engine!r} is unknown; it must be one of {', '.join(ENGINES)}")
    adapter = ENGINES[engine]
    for package in (engine, adapter.partition(".")[0]):
        if importlib.util.find_spec(package) is None:
            raise DoctorError(f"{package} is not installed in this environment")
    findings: list[Finding] = importlib.import_module(adapter).diagnose(model)
    return findings


def main() -> None:
    """Entry point of the `hrm-text` script."""
    app()
