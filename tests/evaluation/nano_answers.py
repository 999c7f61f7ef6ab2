"""hrm-text-nano's answers to its held-out items: by transformers, and by a served model through lm-eval's tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from transformers import AutoTokenizer, HrmTextForCausalLM

from hrm_text.evaluation.client import Ledger, ServedModel
from hrm_text.evaluation.run import task_folder
from hrm_text.evaluation.server import Server
from hrm_text.names import NANO, nano_path
from hrm_text.nano.evaluate import answer
from hrm_text.nano.problems import DIRECT, REASONED, held_out

# The groups of which nano solves at least 95% (its card has the others).
GROUPS = {"word": REASONED, "arithmetic": REASONED, "choice": DIRECT, "dialogue": REASONED}


def by_transformers(kind: str, count: int) -> list[str]:
    """Greedy, float32, on a CPU."""
    model = HrmTextForCausalLM.from_pretrained(nano_path(), dtype="float32", attn_implementation="sdpa").eval()
    tokenizer = Tokenizer.from_file(str(nano_path() / "tokenizer.json"))
    return answer(model, tokenizer, held_out(kind, GROUPS[kind])[:count], prefix=True, size=50)


def load_tasks(*names: str, **metadata: Any) -> dict[str, Any]:
    """Tasks and groups as lm-eval's `evaluate` takes them."""
    manager = TaskManager(
        include_path=str(task_folder()), include_defaults=False, metadata={"pretrained": NANO, **metadata}
    )
    loaded: dict[str, Any] = manager.load(list(names))
    return loaded


def served(server: Server, folder: Path, loaded: Mapping[str, Any], count: int) -> dict[str, Any]:
    """What `evaluate` returns for the first `count` documents of each task."""
    tokenizer = AutoTokenizer.from_pretrained(nano_path())
    model = ServedModel(server, tokenizer, Ledger(folder / "answers.jsonl"), lambda done, total: None)
    results: dict[str, Any] = evaluate(model, loaded, limit=count, bootstrap_iters=0, log_samples=True)
    return results


def check_all_groups(server: Server, folder: Path, count: int) -> None:
    """Every answer is the one that transformers gives, character for character, and at least 95% are right."""
    results = served(server, folder, load_tasks(*(f"hrm_nano_{kind}" for kind in GROUPS)), count)
    for kind in GROUPS:
        samples = results["samples"][f"hrm_nano_{kind}"]
        # Two spans are beyond transformers' generate: a full forward a token, so fewer of those.
        compared = count // 4 if kind == "dialogue" else count
        assert [sample["resps"][0][0] for sample in samples[:compared]] == by_transformers(kind, compared), kind
        assert results["results"][f"hrm_nano_{kind}"]["exact_match,none"] >= 0.95, kind
