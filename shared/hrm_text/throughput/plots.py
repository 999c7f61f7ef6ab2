"""Two plots of a run: throughput against latency over concurrency, and step times beside their floors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hrm_text.throughput.report import Report

# One colour an engine, the plugin's strong and the in-tree models' pale, so that pairs are seen as pairs.
COLOURS = {
    "vllm-in-tree": "#8fb8de",
    "vllm": "#1f5f9e",
    "sglang-in-tree": "#f0b48a",
    "sglang": "#c0561a",
    "transformers": "#7a7a7a",
}
# Where each engine's numbers stand, in points from their dots: engines as fast as each other stay readable.
LABELS = {
    "vllm-in-tree": (13, 0),
    "vllm": (-9, 8),
    "sglang-in-tree": (13, 0),
    "sglang": (9, -9),
    "transformers": (13, 0),
}


def throughput(path: Path, report: "Report") -> None:
    """Output tokens a second against the time per output token, a point for each concurrency of the chat."""
    figure, axes = _figure(8)
    names = [name for name, (workload, _) in report.workloads.items() if workload.kind == "chat"]
    for engine in report.engines:
        points = [
            (name, rate, tpot)
            for name in names
            if (rate := report.store.value(engine, name, "output_throughput"))
            and (tpot := report.store.value(engine, name, "median_tpot_ms"))
        ]
        if not points:
            continue
        x, y = [tpot.median for _, _, tpot in points], [rate.median for _, rate, _ in points]
        across = _errors([tpot for _, _, tpot in points])
        upright = _errors([rate for _, rate, _ in points])
        axes.errorbar(x, y, upright, across, marker="o", capsize=3, label=engine, color=COLOURS[engine])
        for (name, _, _), where in zip(points, zip(x, y, strict=True), strict=True):
            concurrency = report.workloads[name][0].concurrency
            style: dict[str, Any] = {"fontsize": 8, "color": COLOURS[engine], "ha": "center", "va": "center"}
            axes.annotate(str(concurrency), where, LABELS[engine], textcoords="offset points", **style)
    if names and report.store.records:
        floors = [report.floor(name) for name in names]
        x, y = [1000 * floor.tpot for floor in floors], [floor.output_rate for floor in floors]
        axes.plot(x, y, "k--", marker=".", label="floor")
        _logarithmic(axes, axes.xaxis, axes.yaxis)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(xlabel="median time per output token, ms", ylabel="output tokens/s")
    _save(figure, axes, path, f"{report.run['model']}, chat; numbers are requests in flight")


def steps(path: Path, report: "Report") -> None:
    """Time per output token of every workload that generates, and the floor as a line across."""
    names = [name for name, (workload, _) in report.workloads.items() if workload.generated > 1]
    engines = [engine for engine in report.engines if report.store.of(engine)]
    figure, axes = _figure(4 + 1.1 * len(names))
    width = 0.7 / max(len(engines), 1)
    for index, engine in enumerate(engines):
        values = [report.store.value(engine, name, "median_tpot_ms") for name in names]
        known = [(x, value) for x, value in enumerate(values) if value is not None]
        places = [x + (index - (len(engines) - 1) / 2) * width for x, _ in known]
        errors, heights = _errors([value for _, value in known]), [value.median for _, value in known]
        axes.errorbar(places, heights, errors, fmt="o", capsize=3, color=COLOURS[engine], label=engine)
    if engines and names:
        floors = [1000 * report.floor(name).tpot for name in names]
        starts = [x - 0.4 for x in range(len(names))]
        axes.hlines(floors, starts, [x + 0.8 for x in starts], colors="black", label="floor")
        _logarithmic(axes, axes.yaxis)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="median time per output token, ms")
    _save(figure, axes, path, f"{report.run['model']}, step times and their floors")


def _logarithmic(axes: Any, *sides: Any) -> None:
    """Logarithmic axes whose ticks are plain numbers, and few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for side in sides:
        axes.set(**{f"{side.axis_name}scale": "log"})
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_formatter(NullFormatter())


def _figure(width: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, 4.5), layout="constrained")


def _errors(values: Any) -> list[list[float]]:
    return [[v.median - v.lowest for v in values], [v.highest - v.median for v in values]]


def _save(figure: Any, axes: Any, path: Path, title: str) -> None:
    from matplotlib import pyplot

    axes.set_title(title, fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
