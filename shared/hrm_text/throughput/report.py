"""What a run ends in: `results.md`, `results.json` and two plots, every time beside its floor."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hrm_text import __version__
from hrm_text.output_folder import write_json
from hrm_text.throughput.floor import Costs, Floor
from hrm_text.throughput.load import METRICS
from hrm_text.throughput.results import Store, Value, spread
from hrm_text.throughput.workloads import Prompts, Workload

# Columns of the table of workloads: heading, metric, digits.
COLUMNS = (
    ("TTFT, ms", "median_ttft_ms", 1),
    ("p99", "p99_ttft_ms", 1),
    ("TPOT, ms", "median_tpot_ms", 2),
    ("p99", "p99_tpot_ms", 2),
    ("ITL p99, ms", "p99_itl_ms", 2),
    ("E2EL, ms", "median_e2el_ms", 0),
    ("output tokens/s", "output_throughput", 1),
    ("total tokens/s", "total_token_throughput", 1),
    ("good requests/s", "request_goodput", 2),
)
MIB = 1 << 20


class Report:
    """The records of a run, as files.

    Args:
        out: the folder they go to.
        run: what was measured, with what.
        store: the records.
        engines: in the order of the tables.
        workloads: by name, with their prompts.
        costs: of the model on this machine.
    """

    def __init__(
        self,
        out: Path,
        run: Mapping[str, Any],
        store: Store,
        engines: Sequence[str],
        workloads: Mapping[str, tuple[Workload, Prompts]],
        costs: Costs,
    ) -> None:
        self.out, self.run, self.store, self.costs = out, run, store, costs
        self.engines, self.workloads = engines, workloads
        self.files = [out / name for name in ("results.md", "results.json", "throughput.png", "steps.png")]

    def write(self) -> None:
        """All files, from the records so far."""
        from hrm_text.throughput import plots

        markdown, data, throughput, steps = self.files
        markdown.write_text(self.markdown() + "\n")
        write_json(data, self.json())
        plots.throughput(throughput, self)
        plots.steps(steps, self)

    def floor(self, name: str) -> Floor:
        """The floor of a workload, at the answers' measured length."""
        workload, prompts = self.workloads[name]
        lengths = [
            record.metrics["total_output_tokens"] / record.metrics["completed"]
            for record in self.store.records.values()
            if record.workload == name
        ]
        output = sum(lengths) / len(lengths) if lengths else workload.generated
        return self.costs.floor(prompts.fresh, prompts.lengths, output, workload.concurrency)

    def json(self) -> dict[str, Any]:
        """Everything: versions, command lines, rates, floors, each record, and medians with their range."""
        summary = [
            {"engine": engine, "workload": name, "metric": metric, **asdict(value)}
            for engine in self.engines
            for name in self.workloads
            for metric in METRICS
            if (value := self.store.value(engine, name, metric)) is not None
        ]
        return {
            "hrm_text": __version__,
            **self.run,
            "rates": asdict(self.costs.rates),
            "floors": {name: asdict(self.floor(name)) for name in self.workloads},
            "workloads": {name: asdict(workload) for name, (workload, _) in self.workloads.items()},
            "summary": summary,
            "records": [asdict(record) for record in self.store.records.values()],
        }

    def markdown(self) -> str:
        """Two tables: the workloads, and the engines."""
        rates = self.costs.rates
        weights = ", dummy weights" if self.run["dummy"] else ""
        limits = ", ".join(f"{name.upper()} ≤ {limit:g} ms" for name, limit in self.run["limits_ms"].items())
        lines = [
            f"{self.run['model']}{weights}; {rates.device}: copies {rates.bandwidth / 1e9:.4g} GB/s, multiplies "
            f"{rates.flops / 1e12:.3g} TFLOP/s. Medians of the repeats, (lowest–highest); good: {limits}.",
            "",
            *_row("workload", "engine", *(heading for heading, _, _ in COLUMNS)),
            "|---|---|" + "--:|" * len(COLUMNS),
        ]
        for name in self.workloads:
            lines += self._workload_rows(name)
        lines += ["", *_row("engine", "start, s", "memory, MiB", "KV tokens"), "|---|--:|--:|--:|"]
        for engine in self.engines:
            records = self.store.of(engine)
            if not records:
                continue
            starts = {record.repeat: record.start_seconds for record in records}
            tokens = [record.kv_tokens for record in records if record.kv_tokens]
            lines += _row(
                engine,
                _cell(spread(list(starts.values())), 0),
                f"{max(record.memory_mib for record in records):,.0f}",
                f"{tokens[-1]:,}" if tokens else "",
            )
        lines += _row("floor", "", f"{self.costs.held_bytes / MIB:,.0f} (weights)", "")
        return "\n".join(lines)

    def _workload_rows(self, name: str) -> list[str]:
        # A single token has no time per token.
        single = self.workloads[name][0].generated == 1
        shown = [not (single and ("tpot" in metric or "itl" in metric)) for _, metric, _ in COLUMNS]
        rows = []
        for engine in self.engines:
            cells = [
                _cell(self.store.value(engine, name, metric), digits) if show else ""
                for show, (_, metric, digits) in zip(shown, COLUMNS, strict=True)
            ]
            if any(cells):
                rows += _row(name, engine, *cells)
        if not rows:
            return []
        floor = self.floor(name)
        known = {
            "median_ttft_ms": 1000 * floor.ttft,
            "median_tpot_ms": 1000 * floor.tpot,
            "median_e2el_ms": 1000 * floor.e2el,
            "output_throughput": floor.output_rate,
        }
        cells = [
            f"{known[metric]:,.{digits}f}" if show and metric in known else ""
            for show, (_, metric, digits) in zip(shown, COLUMNS, strict=True)
        ]
        return [*rows, *_row(name, "*floor*", *cells)]


def _row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _cell(value: Value | None, digits: int) -> str:
    if value is None:
        return ""
    shown = f"{value.median:,.{digits}f}"
    return (
        shown if value.lowest == value.highest else f"{shown} ({value.lowest:,.{digits}f}–{value.highest:,.{digits}f})"
    )
