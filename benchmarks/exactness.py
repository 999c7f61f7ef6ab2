"""How far off the in-tree model is, and this plugin: largest |log-prob - oracle's| for each consequence of the mask.

    python -m benchmarks.exactness

Runs on a CPU in float32 with a random tiny model, so what is left is the mask: rounding stays near 1e-6.
"""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from hrm_text.oracle import load_reference
from hrm_text.spans import scored_inside
from tests.conftest import make_checkpoint
from tests.vllm.engine import Answer, Ask, Engine
from tests.vllm.mixes import deviation, true_spans
from tests.vllm.test_prefix_cache import prompt

P = prompt(160)
REPEATING = tuple(range(20, 50)) * 3
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
ENGINES: dict[str, dict[str, Any]] = {"in-tree": {"env": {"VLLM_PLUGINS": ""}}, "plugin": {}}


@dataclass(frozen=True)
class Case:
    """Requests served one batch after the other, all of them compared with the oracle."""

    name: str
    batches: list[list[Ask]]
    options: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("one prompt, one span", [[Ask(P, (0, 160), 12)]]),
    Case("multi-turn: two spans with an answer between", [[Ask(P, (0, 60, 90, 160), 12)]]),
    Case("causal prompt", [[Ask(P, (), 12)]]),
    Case("scored continuation", [[Ask(P, (0, 100), 1, score=True)]]),
    Case("same prompt again", [[Ask(P, (0, 160), 4)], [Ask(P, (0, 160), 4)]]),
    Case(
        "recompute after preemption",
        [[Ask(prompt(100, seed), (0, 100), 90) for seed in range(6)]],
        {"num_gpu_blocks_override": 14},
    ),
    Case(
        "speculative verification (n-gram)",
        [[Ask(REPEATING, (0, 90), 40)]],
        {"speculative_config": NGRAM},
    ),
]


def measure(model: str, reference: Any, case: Case, engine: dict[str, Any]) -> float:
    """Largest deviation of a case on one engine."""
    with Engine(model=model, max_num_batched_tokens=1024, **(engine | case.options)) as running:
        return max(
            deviation(reference, ask, [_outside_spans(ask, answer) for answer in answers])
            for batch in case.batches
            for ask, answers in zip(batch, running.ask(batch), strict=True)
        )


def _outside_spans(ask: Ask, answer: Answer) -> Answer:
    """The in-tree model also scores tokens inside spans, where there is nothing to be right about."""
    if answer.prompt_logprobs is None:
        return answer
    spans = true_spans(ask)
    kept = tuple(None if scored_inside(spans, p) else value for p, value in enumerate(answer.prompt_logprobs))
    return replace(answer, prompt_logprobs=kept)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_checkpoint(Path(folder) / "tiny"))
        reference = load_reference(model)
        rows = ["| case | " + " | ".join(ENGINES) + " |", "|---|" + "---|" * len(ENGINES)]
        for case in CASES:
            values = [f"{measure(model, reference, case, engine):.1e}" for engine in ENGINES.values()]
            rows.append(f"| {case.name} | {' | '.join(values)} |")
            print(rows[-1], flush=True)
    Console().print(Markdown("\n".join(rows)))


if __name__ == "__main__":
    main()
