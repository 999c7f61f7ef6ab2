"""What a run ends in: a table, a JSON file and a plot, the paper's numbers beside the measured ones."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from hrm_text import __version__


@dataclass(frozen=True)
class Benchmark:
    """A task by its short name.

    Attributes:
        metric: the one that the paper, or the authors' table, gives.
        paper: its value in percent; None where there is none.
    """

    metric: str
    paper: float | None = None


BENCHMARKS = {
    "mmlu": Benchmark("acc_macro", 60.7),
    "arc_challenge": Benchmark("acc", 81.9),
    "drop": Benchmark("f1", 82.2),
    "gsm8k": Benchmark("exact_match", 84.5),
    "math": Benchmark("exact_match", 56.2),
    "hellaswag": Benchmark("acc", 63.4),
    "winogrande": Benchmark("acc", 72.4),
    "boolq": Benchmark("acc", 86.2),
    "mmlu_loglikelihood": Benchmark("acc_macro"),
    "nano_word": Benchmark("exact_match"),
    "nano_arithmetic": Benchmark("exact_match"),
    "nano_choice": Benchmark("exact_match"),
    "nano_dialogue": Benchmark("exact_match"),
}


@dataclass(frozen=True)
class Result:
    """One benchmark's outcome.

    Attributes:
        measured: the metric in percent, like `stderr` and `paper`.
        rows: that were scored.
        metrics: every metric's [value, standard error], as lm-eval has them.
        subjects: the metric of each part of a group, likewise.
    """

    task: str
    metric: str
    measured: float
    stderr: float | None
    paper: float | None
    rows: int
    metrics: dict[str, list[float | None]]
    subjects: dict[str, float]


def result_of(task: str, results: dict[str, Any]) -> Result:
    """Read what lm-eval's `evaluate` returned for one task or group."""
    benchmark, name = BENCHMARKS[task], f"hrm_{task}"
    scores = results.get("groups", {}).get(name) or results["results"][name]
    metrics = {
        key.removesuffix(",none"): [value, _number(scores.get(f"{key.removesuffix(',none')}_stderr,none"))]
        for key, value in scores.items()
        if key.endswith(",none") and not key.endswith("_stderr,none")
    }
    parts = {key.partition("::")[2]: part for key, part in results["results"].items() if key.startswith(f"{name}::")}
    measured, error = float(scores[f"{benchmark.metric},none"]), metrics[benchmark.metric][1]
    stderr = None if error is None else 100 * error
    rows = sum(count["effective"] for key, count in results["n-samples"].items() if key.partition("::")[0] == name)
    subjects = {key: part[f"{benchmark.metric},none"] for key, part in parts.items()}
    return Result(task, benchmark.metric, 100 * measured, stderr, benchmark.paper, rows, metrics, subjects)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value == value else None  # "N/A" for a single row


def write(folder: Path, run: dict[str, Any], results: Sequence[Result]) -> None:
    """`results.json`, whole at any time, and `results.png`."""
    report = {"hrm_text": __version__, **run, "results": [asdict(result) for result in results]}
    temporary = folder / "results.json.part"
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(folder / "results.json")
    plot(folder / "results.png", str(run["model"]), results)


def table(results: Sequence[Result]) -> Table:
    """The results a line each."""
    rows = Table("task", "metric", "rows", "measured", "± stderr", "paper", box=None)
    for column in rows.columns[2:]:
        column.justify = "right"
    for result in results:
        paper = "" if result.paper is None else f"{result.paper:.1f}"
        stderr = "" if result.stderr is None else f"{result.stderr:.1f}"
        rows.add_row(result.task, result.metric, str(result.rows), f"{result.measured:.1f}", stderr, paper)
    return rows


def plot(path: Path, model: str, results: Sequence[Result]) -> None:
    """Bars with standard errors, and the paper's value as a line across each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(3 + 1.1 * len(results), 4), layout="constrained")
    errors = [result.stderr or 0.0 for result in results]
    axes.bar(range(len(results)), [r.measured for r in results], 0.6, yerr=errors, capsize=4, color="#4878a8")
    known = [(x, result.paper) for x, result in enumerate(results) if result.paper is not None]
    if known:
        starts = [x - 0.4 for x, _ in known]
        ends = [x + 0.4 for x, _ in known]
        axes.hlines([value for _, value in known], starts, ends, colors="#c04830", label="paper")
        axes.legend(loc="upper right")
    labels = [f"{r.task}\n{r.metric}\n{r.measured:.1f}" for r in results]
    axes.set_xticks(range(len(results)), labels, fontsize=8)
    axes.set(ylim=(0, 105), ylabel="percent, ± standard error")
    axes.set_title(model, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
