"""A folder of results: of one run, gone on with by the same command, and never half written."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrm_text.names import KERNELS_OPTION


def claim(out: Path, run: Mapping[str, Any], error: type[Exception]) -> None:
    """Make `out` the folder of `run`; what the option says of the fused kernels belongs to a run.

    Args:
        out: made if it is not there.
        run: what all results of the folder must share, fit for JSON.
        error: raised when the folder holds another run's, or cannot be written.
    """
    path = out / "run.json"
    mine = json.loads(json.dumps({**run, "kernels": os.environ.get(KERNELS_OPTION, "default")}))
    if path.exists() and (theirs := json.loads(path.read_text())) != mine:
        changed = next(key for key in mine | theirs if mine.get(key) != theirs.get(key))
        raise error(
            f"out: {out} holds results of a run with {changed} {theirs.get(changed)!r}, not {mine.get(changed)!r}; "
            "choose another folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, mine)
    except OSError as failure:
        raise error(f"out: {out} cannot be written ({failure.strerror})") from None


def write_json(path: Path, value: Any) -> None:
    """A file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)
