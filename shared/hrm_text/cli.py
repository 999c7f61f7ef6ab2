"""The `hrm-text` command."""

import importlib.util
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hrm_text.doctor import DoctorError, Finding
from hrm_text.names import NANO

app = typer.Typer(no_args_is_help=True, add_completion=False, help="HRM-Text in vLLM and SGLang.")
ENGINES = {"vllm": "hrm_vllm.doctor", "sglang": "hrm_sglang.doctor"}


@app.callback()
def _root() -> None:
    """Keeps `doctor` a subcommand while it is the only one."""


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
