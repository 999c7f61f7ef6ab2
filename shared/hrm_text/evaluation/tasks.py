"""What the YAML files in benchmarks/lm_eval call: data sets of ready prompts, and scores.

lm-eval cuts a prompt that is too long on its left and has one generation limit for a whole task. By the
protocol such a prompt scores as an empty answer, and prompt and output share one context, so both are settled
here, with the model's own tokenizer, before lm-eval sees the prompt.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.task import ConfigurableTask

from hrm_text.envelope import ANSWER_END, MARKERS, wrap_prompt
from hrm_text.evaluation import prompts
from hrm_text.evaluation.prompts import Item
from hrm_text.evaluation.rows import DataError, Row, file_names, hub_rows, local_rows
from hrm_text.evaluation.scoring import choice_score, integer_answer, letters, math_correct
from hrm_text.names import resolve_model

logger = logging.getLogger(__name__)

# The authors' three shots are rows of DROP's training split, found by how passage and question begin.
DROP_SHOTS = (
    ("To start the season, the Lions traveled south", "How many points did the buccaneers need to tie in the first?"),
    ("Trying to snap a two-game skid, the Bills", "How many games had the Bills won before this game?"),
    ("The French king, John II", "How many years before Navarrase used the captivity of John II?"),
)


class HrmTask(ConfigurableTask):
    """A task whose answers may fill what the prompt leaves of the context."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Any:
        request = super().construct_requests(doc, ctx, **kwargs)
        request.arguments[1]["max_gen_toks"] = doc["room"]
        return request


class Documents(list[Item]):
    """What lm-eval asks of a data set; one of `datasets` would hash itself, which some releases cannot."""

    @property
    def features(self) -> Item:
        return self[0]


def load(
    benchmark: str,
    path: str,
    split: str,
    condition: str,
    context: int,
    name: str | list[str] | None = None,
    shots_split: str = "",
    shots: int = 0,
    data_dir: str = "",
    **run: Any,
) -> dict[str, Documents]:
    """The data set of a task: one document a row, its prompt in the envelope.

    Args:
        benchmark: a name in `prompts`, and what local files are called after.
        path: of the data set on the Hub, like `name` and `split`.
        condition: of the envelope.
        context: tokens that prompt and answer may have together.
        shots_split: where the worked shots are from, like `shots`, their number.
        data_dir: folder of JSONL files, instead of the Hub.
        run: lm-eval's model arguments.

    Raises:
        ValueError: a row or a model argument cannot be used; the message says which.
    """

    def rows_of(part: str) -> list[Row]:
        if not data_dir:
            names = name if isinstance(name, list) else [name]
            return [row for each in names for row in hub_rows(path, each, part)]
        rows = local_rows(data_dir, file_names(benchmark, part))
        return [row for row in rows if row.get("subject", str) == name] if benchmark == "mmlu" else rows

    rows = rows_of(split)
    if benchmark == "drop":
        worked = "".join(f"{shot}\n\n" for shot in drop_shots(rows_of(shots_split)))
        items = [item | {"prompt": worked + item["prompt"]} for item in map(prompts.drop, rows)]
    elif benchmark in prompts.QUESTIONS:
        read = prompts.QUESTIONS[benchmark]
        examples = [read(row) for row in rows_of(shots_split)[:shots]]
        if len(examples) < shots:
            raise DataError(f"{benchmark}: {shots} shots are needed, {shots_split} has {len(examples)}")
        items = [prompts.few_shot(examples, read(row)) for row in rows]
    else:
        items = [prompts.ITEMS[benchmark](row) for row in rows]
    for row, item in zip(rows, items, strict=True):
        if marker := next((marker for marker in MARKERS if marker in item["prompt"]), None):
            raise DataError(f"{row.place}: the prompt holds the marker {marker}, which would end its span")
        item["prompt"] = wrap_prompt(item["prompt"].strip(), condition)
    return documents(items, condition, context, run)


def load_nano(kind: str, condition: str, context: int, **run: Any) -> dict[str, Documents]:
    """The data set of one group of hrm-text-nano's held-out items; see `load`."""
    from hrm_text.nano.problems import held_out

    items = []
    for problem in held_out(kind, condition):
        turns = [wrap_prompt(turn.prompt, condition) + turn.response + ANSWER_END for turn in problem.history]
        prompt = "".join([*turns, wrap_prompt(problem.prompt, condition)])
        items.append({"prompt": prompt, "gold": problem.answer})
    return documents(items, condition, context, run)


def drop_shots(rows: Sequence[Row]) -> list[str]:
    """DROP's three fixed shots, worked."""
    found = []
    for opening, question in DROP_SHOTS:
        row = next((r for r in rows if _is_shot(r.fields, opening, question)), None)
        if row is None:
            raise DataError(f"drop: the shot {question!r} is not among the {len(rows)} rows that shots are from")
        item = prompts.drop(row)
        found.append(f"{item['prompt'].strip()} {', '.join(item['answers'][0])}")
    return found


def _is_shot(fields: Mapping[str, Any], opening: str, question: str) -> bool:
    return bool(str(fields.get("passage")).startswith(opening) and fields.get("question") == question)


def documents(items: Sequence[Item], condition: str, context: int, run: Mapping[str, Any]) -> dict[str, Documents]:
    """lm-eval's data set of `items`; a prompt that leaves no room for an answer gives way to an empty one."""
    name = resolve_model(str(run.get("tokenizer") or run.get("pretrained") or run.get("model") or ""))
    if not name:
        raise ValueError("model_args: pretrained (or model) must name the model, whose tokenizer measures the prompts")
    limit = usable_context(name, context, run)
    lengths = [len(ids) for ids in _tokenizer(name)([i["prompt"] for i in items], add_special_tokens=False).input_ids]
    rows = [
        item
        | {"prompt_tokens": length, "fits": length < limit, "room": max(limit - length, 1)}
        | ({"prompt": wrap_prompt("", condition)} if length >= limit else {})
        | ({"options": list(letters(item["choices"]))} if "choices" in item else {})
        for item, length in zip(items, lengths, strict=True)
    ]
    if too_long := sum(length >= limit for length in lengths):
        logger.warning("%d of %d prompts do not fit %d tokens: their answers are empty", too_long, len(rows), limit)
    return {"test": Documents(rows)}


def usable_context(name: str, context: int, run: Mapping[str, Any]) -> int:
    """Tokens that prompt and answer may have together: `context`, or all that a smaller model has.

    Raises:
        ValueError: lm-eval was given a smaller limit, by which it would cut prompts without a word.
    """
    needed = min(context, _positions(name))
    if run.get("base_url"):
        key, given = "max_length", int(run.get("max_length") or 2048) - 1  # lm-eval's default, and its spare token
    else:
        key = next((key for key in ("max_model_len", "max_length", "context_length") if run.get(key)), "")
        given = int(run[key]) if key else needed
    if given < needed:
        enough = needed + bool(run.get("base_url"))
        raise ValueError(f"model_args: {key} must be at least {enough} for this task, or lm-eval would cut its prompts")
    return needed


@functools.cache
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


@functools.cache
def _positions(name: str) -> int:
    from transformers import PretrainedConfig

    return int(PretrainedConfig.get_config_dict(name)[0]["max_position_embeddings"])


def _text(doc: Mapping[str, Any], results: Sequence[str]) -> str:
    return results[0] if doc["fits"] else ""


def score_integer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """GSM8K."""
    answer = integer_answer(_text(doc, results))
    return {"exact_match": float(answer == doc["gold"]), "invalid": float(answer is None)}


def score_math(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """MATH."""
    return {"exact_match": float(math_correct(doc["gold"], _text(doc, results)))}


def score_choice(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """One letter."""
    score, valid = choice_score(_text(doc, results), doc["gold"], doc["choices"])
    return {"acc": score, "invalid": float(not valid)}


def score_subject(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """One letter, under two names: the group averages one over questions, the other over subjects."""
    scores = score_choice(doc, results)
    return {"acc_macro": scores["acc"], "acc_micro": scores["acc"], "invalid": scores["invalid"]}


def score_drop(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """DROP, by lm-eval's own exact match and F1."""
    from lm_eval.tasks.drop.utils import process_results

    return dict(process_results(doc, [_text(doc, results).strip()]))


def score_nano(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """hrm-text-nano's held-out items."""
    from hrm_text.nano.problems import final_answer

    return {"exact_match": float(final_answer(_text(doc, results)) == doc["gold"])}


def score_loglikelihood(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The likeliest letter, and the right letter's log-prob; a prompt that does not fit earns a guess's share."""
    logprobs = [logprob for logprob, _ in results]
    right = float(max(range(len(logprobs)), key=logprobs.__getitem__) == doc["gold"])
    score = right if doc["fits"] else 1 / doc["choices"]
    return {"acc_macro": score, "acc_micro": score, "logprob": logprobs[doc["gold"]]}
