"""Rows of the benchmarks: from the Hub, or from JSONL files in a folder."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Parts of the whole that stand in for it, as in shared/data of the project.
STAND_INS = {"math_test.jsonl": "math500_test.jsonl", "mmlu_test.jsonl": "mmlu_test_1in10.jsonl"}


class DataError(ValueError):
    """A file is missing or a row cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Row:
    """One row and where it came from, for messages.

    Attributes:
        fields: as on the Hub.
        place: "file:line", or data set, split and index.
    """

    fields: dict[str, Any]
    place: str

    def get(self, name: str, kind: type) -> Any:
        """The value of a field.

        Raises:
            DataError: it is missing or of another type.
        """
        value = self.fields.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fault(name, f"must be {_TYPE_NAMES[kind]}", value)
        return value

    def fault(self, name: str, demand: str, value: Any) -> DataError:
        """The error for a field that cannot be used."""
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        return DataError(f"{self.place}: field {name!r} {demand}, got {shown}")


_TYPE_NAMES: dict[type, str] = {
    str: "text",
    int: "an integer",
    list: "a list",
    dict: "an object",
    bool: "true or false",
}


def file_names(benchmark: str, split: str) -> list[str]:
    """The names that a file of a benchmark's rows may have; the first that is there counts."""
    name = f"{benchmark}_{split}.jsonl"
    return [name, STAND_INS[name]] if name in STAND_INS else [name]


def local_rows(folder: str | Path, names: Sequence[str]) -> list[Row]:
    """Rows of the first of the files `names` that is there.

    Raises:
        DataError: none is, or a line is not a JSON object.
    """
    for name in names:
        if (path := Path(folder) / name).is_file():
            return _read_jsonl(path)
    raise DataError(f"data-dir: {folder} has no {' or '.join(names)}")


@functools.cache
def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # Not splitlines(): a row may hold a character that it takes for a line's end.
    for number, line in enumerate(path.read_text().split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise DataError(f"{path}:{number}: must be a JSON object, got {type(fields).__name__}")
        rows.append(Row(fields, f"{path}:{number}"))
    if not rows:
        raise DataError(f"{path}: has no rows")
    return rows


@functools.cache
def hub_rows(path: str, name: str | None, split: str) -> list[Row]:
    """Rows of a Hub data set.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    label = " ".join(filter(None, (path, name, split)))
    try:
        loaded = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # a dozen kinds, from no network to a changed data set
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"data set {label} cannot be loaded from the Hub ({type(error).__name__}: {reason}); "
            "give a folder of JSONL files with --data-dir"
        ) from error
    return [Row(dict(fields), f"{label} row {index}") for index, fields in enumerate(loaded)]
