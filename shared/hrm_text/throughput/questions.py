"""The benchmarks' own prompts, as an evaluation asks them, from JSONL files in a folder."""

from pathlib import Path

from hrm_text.envelope import wrap_prompt
from hrm_text.evaluation.prompts import Question, few_shot, mmlu
from hrm_text.evaluation.rows import file_names, local_rows

BENCHMARKS = ("gsm8k", "math", "mmlu")
# As in benchmarks/lm_eval/hrm_mmlu.yaml: five of these long shots would not fit.
SHOTS = {"high_school_european_history": 3}


def why_missing(benchmark: str, folder: Path) -> str | None:
    """The reason that a folder has no prompts of a benchmark; None if it has."""
    for split in ("test", "dev") if benchmark == "mmlu" else ("test",):
        names = file_names(benchmark, split)
        if not any((folder / name).is_file() for name in names):
            return f"{folder} has no {' or '.join(names)}"
    return None


def questions(benchmark: str, folder: Path, count: int) -> list[str]:
    """Prompts in their envelope, of the first `count` rows, or of all if it is 0.

    Raises:
        DataError: a file is missing, or a row cannot be used.
    """
    rows = local_rows(folder, file_names(benchmark, "test"))[: count or None]
    if benchmark != "mmlu":
        field = {"gsm8k": "question", "math": "problem"}[benchmark]
        return [wrap_prompt(row.get(field, str).strip(), "synth,cot") for row in rows]
    shots: dict[str, list[Question]] = {}
    for row in local_rows(folder, file_names(benchmark, "dev")):
        shots.setdefault(row.get("subject", str), []).append(mmlu(row))
    asked = [(row.get("subject", str), mmlu(row)) for row in rows]
    return [
        wrap_prompt(few_shot(shots.get(subject, [])[: SHOTS.get(subject, 5)], question)["prompt"].strip(), "direct")
        for subject, question in asked
    ]
