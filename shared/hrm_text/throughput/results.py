"""Results on disk: one file for each (engine, workload, repeat), written as soon as it is measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from hrm_text.output_folder import write_json


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        command: what the load generator was called with.
        server: the engine's own command line.
        metrics: see `load.METRICS`.
        start_seconds: until the engine answered.
        memory_mib: the highest until then.
        kv_tokens: that fit its cache; None where it has none of a fixed size.
    """

    engine: str
    workload: str
    repeat: int
    command: str
    server: str
    metrics: Mapping[str, float]
    start_seconds: float
    memory_mib: float
    kv_tokens: int | None


@dataclass(frozen=True)
class Value:
    """The median of the repeats, and the lowest and the highest of them."""

    median: float
    lowest: float
    highest: float


class Store:
    """The records of an output folder."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "records"
        self.records: dict[tuple[str, str, int], Record] = {}
        for path in sorted(self.folder.glob("*.json")):
            record = Record(**json.loads(path.read_text()))
            self.records[record.engine, record.workload, record.repeat] = record

    def add(self, record: Record) -> None:
        """Keep a record; a file is whole or absent."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{record.engine}.{record.workload}.{record.repeat}.json", asdict(record))
        self.records[record.engine, record.workload, record.repeat] = record

    def of(self, engine: str, workload: str | None = None) -> list[Record]:
        """An engine's records, of one workload or of all."""
        return [r for r in self.records.values() if r.engine == engine and workload in (None, r.workload)]

    def value(self, engine: str, workload: str, metric: str) -> Value | None:
        """A metric over the repeats; None if nothing was measured."""
        return spread([record.metrics[metric] for record in self.of(engine, workload)])


def spread(values: Sequence[float]) -> Value | None:
    """Median and range."""
    return Value(median(values), min(values), max(values)) if values else None
