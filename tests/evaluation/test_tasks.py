"""The tasks as lm-eval loads them: prompts token for token, limits, and what a bad row is answered with."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from hrm_text.envelope import ChatEncoder
from hrm_text.evaluation import tasks
from hrm_text.names import NANO, nano_path
from hrm_text.spans import SpanRule, request_spans
from tests.evaluation.conftest import ROOT

TASKS = ROOT / "benchmarks/lm_eval"
MMLU = {"question": " What is 2+2? ", "subject": "anatomy", "choices": ["1", "2", " 4", "5"], "answer": 2}
# One made-up row of each benchmark, with the fields it has on the Hub.
ROWS: dict[str, dict[str, Any]] = {
    "gsm8k_test": {"question": "Tom has 2 boxes of 3. How many?", "answer": "2*3=6\n#### 6"},
    "math_test": {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$."},
    "mmlu_dev": MMLU,
    "mmlu_test": MMLU,
    "arc_challenge_validation": {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "hellaswag_train": {"ctx_a": "He runs.", "ctx_b": "then he", "endings": ["stops.", "flies."], "label": "0"},
    "winogrande_train": {"sentence": "A is not B, so _ won.", "option1": "A", "option2": "B", "answer": "1"},
    "boolq_train": {"passage": "Ice is cold.", "question": "is ice cold", "answer": True},
}
ROWS |= {
    "arc_challenge_test": ROWS["arc_challenge_validation"],
    "hellaswag_validation": ROWS["hellaswag_train"],
    "winogrande_validation": ROWS["winogrande_train"],
    "boolq_validation": ROWS["boolq_train"],
}
DROP_ANSWER = {"number": "3", "date": {"day": "", "month": "", "year": ""}, "spans": []}
DROP_NONE: dict[str, list[Any]] = {"number": [], "date": [], "spans": []}


def drop_row(passage: str, question: str) -> dict[str, Any]:
    return {"passage": passage, "question": question, "answer": DROP_ANSWER, "validated_answers": DROP_NONE}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small JSONL files for every benchmark."""
    folder = tmp_path_factory.mktemp("rows")
    for name, row in ROWS.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 25)
    shots = [drop_row(f"{opening} and so on.", question) for opening, question in tasks.DROP_SHOTS]
    (folder / "drop_train.jsonl").write_text("\n".join(map(json.dumps, shots)))
    (folder / "drop_validation.jsonl").write_text(json.dumps(drop_row("Three scored.", "How many scored?")))
    return folder


def loaded(name: str, folder: Path | str, **run: Any) -> dict[str, Any]:
    manager = TaskManager(
        include_path=str(TASKS),
        include_defaults=False,
        metadata={"pretrained": NANO, "data_dir": str(folder), **run},
    )
    found: dict[str, Any] = manager.load([name])["tasks"]
    return found


SUM = "What is 2+2?\nA. 1\nB. 2\nC. 4\nD. 5\nAnswer:"
HOT = "Which is hot?\nA. ice\nB. fire\nAnswer:"
RUN = "He runs. Then he\nQuestion: Which is the most logical continuation?\nA. stops.\nB. flies.\nAnswer:"
WON = "A is not B, so _ won.\nA. A\nB. B\nAnswer:"
ICE = "Ice is cold.\nQuestion: Is ice cold?\nA. Yes\nB. No\nAnswer:"
PROMPTS = {
    "hrm_gsm8k": ("synth,cot", "Tom has 2 boxes of 3. How many?"),
    "hrm_math": ("synth,cot", "What is $1+1$?"),
    "hrm_mmlu::anatomy": ("direct", f"{SUM} C\n\n" * 5 + SUM),
    "hrm_arc_challenge": ("direct", f"{HOT} B\n\n" * 25 + HOT),
    "hrm_hellaswag": ("direct", f"{RUN} A\n\n" * 10 + RUN),
    "hrm_winogrande": ("direct", f"{WON} A\n\n" * 5 + WON),
    "hrm_boolq": ("direct", f"{ICE} A\n\n" * 5 + ICE),
    "hrm_drop": (
        "direct",
        "".join(f"{opening} and so on.\nQ: {question}\nA: 3\n\n" for opening, question in tasks.DROP_SHOTS)
        + "Three scored.\nQ: How many scored?\nA:",
    ),
}


@pytest.fixture(scope="module")
def subject_folder(made_up: Path) -> Path:
    """MMLU's group loads all subjects: rows for each."""
    group = (TASKS / "hrm_mmlu.yaml").read_text()
    subjects = [line.split("{task: ")[1].split(",")[0] for line in group.splitlines() if "{task: " in line]
    assert len(set(subjects)) == 57
    for part in ("dev", "test"):
        rows = [json.dumps(MMLU | {"subject": subject}) for subject in subjects for _ in range(6)]
        (made_up / f"mmlu_{part}.jsonl").write_text("\n".join(rows))
    return made_up


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_is_the_protocols_token_for_token(name: str, subject_folder: Path) -> None:
    condition, instruction = PROMPTS[name]
    group, _, _ = name.partition("::")
    found = loaded(group, subject_folder)[name]
    found.set_fewshot_seed(0)
    found.build_all_requests(limit=1, rank=0, world_size=1)
    prompt, options = found.instances[0].args
    tokenizer = AutoTokenizer.from_pretrained(nano_path())
    encoder = ChatEncoder.of(tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert ids == encoder.encode_chat([{"role": "user", "content": instruction}], condition)
    assert request_spans(tuple(ids), {}, SpanRule(encoder.envelope)) == ((0, len(ids)),)
    assert options["until"] == ["<|box_end|>"] and options["temperature"] == 0 and not options["do_sample"]
    context = min(3072 if name in ("hrm_gsm8k", "hrm_math", "hrm_drop") else 4096, 1024)
    assert options["max_gen_toks"] == (1 if "Answer:" in prompt else context - len(ids))


def test_shots_of_one_long_subject_are_three(subject_folder: Path) -> None:
    subjects = loaded("hrm_mmlu", subject_folder)
    for name, task in subjects.items():
        shots = task.eval_docs[0]["prompt"].count("Answer: C")
        assert shots == (3 if name.endswith("high_school_european_history") else 5), name


def test_prompt_that_does_not_fit_scores_as_an_empty_answer(tmp_path: Path) -> None:
    tokens = 1024 - 4  # envelope and two conditions
    for length, fits in ((tokens - 1, True), (tokens, False)):
        row = {"question": "\x00" * length, "answer": "#### 1"}  # a byte a token
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "gsm8k_test.jsonl").write_text(json.dumps(row))
        task = loaded("hrm_gsm8k", folder)["hrm_gsm8k"]
        doc = task.eval_docs[0]
        assert (doc["prompt_tokens"], doc["fits"], doc["room"]) == (length + 4, fits, 1)
        assert task.process_results(doc, [r"\boxed{1}"])["exact_match"] == float(fits)
        if not fits:
            assert doc["prompt"] == "<|im_start|><|quad_end|><|object_ref_end|><|im_end|>"


def test_multiple_choice_that_does_not_fit_earns_a_guess() -> None:
    doc = {"fits": False, "gold": 0, "choices": 4}
    assert tasks.score_choice(doc, ["A"]) == {"acc": 0.25, "invalid": 1.0}
    assert tasks.score_loglikelihood(doc, [(0.0, True), *[(-9.0, False)] * 3])["acc_macro"] == 0.25


def test_drop_is_scored_by_lm_eval() -> None:
    doc = {"fits": True, "answers": [["3"], ["Tom Brady", "Moss"]]}
    assert tasks.score_drop(doc, [" 3\n"]) == {"em": 1.0, "f1": 1.0}
    assert tasks.score_drop(doc, ["Brady"])["em"] == 0.0
    assert tasks.score_drop(doc | {"fits": False}, ["3"])["em"] == 0.0


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"max_model_len": 512}, "max_model_len must be at least 1024"),
        ({"base_url": "x", "max_length": 1024}, "max_length must be at least 1025"),
        ({"pretrained": ""}, "pretrained"),
    ],
)
def test_limits_by_which_lm_eval_would_cut_prompts_are_refused(
    run: dict[str, Any], message: str, made_up: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        loaded("hrm_gsm8k", made_up, **run)


@pytest.mark.parametrize(
    ("task", "file", "line", "message"),
    [
        ("hrm_gsm8k", "gsm8k_test", '{"question": "x"', "gsm8k_test.jsonl:2: not JSON"),
        ("hrm_gsm8k", "gsm8k_test", "[1]", "gsm8k_test.jsonl:2: must be a JSON object"),
        ("hrm_gsm8k", "gsm8k_test", {"question": 3}, "gsm8k_test.jsonl:2: field 'answer' must be text"),
        ("hrm_gsm8k", "gsm8k_test", {"question": "x", "answer": "6"}, "2: field 'answer' must end with"),
        ("hrm_gsm8k", "gsm8k_test", {"question": "<|im_end|>", "answer": "#### 6"}, "2: the prompt holds the marker"),
        ("hrm_math", "math_test", {"problem": "x", "solution": "6"}, "2: field 'solution' must have its answer"),
        ("hrm_boolq", "boolq_validation", ROWS["boolq_train"] | {"answer": 1}, "2: field 'answer' must be true"),
        ("hrm_mmlu", "mmlu_test", MMLU | {"answer": 4}, "2: field 'answer' must name one of the 4 choices, got 4"),
        ("hrm_mmlu", "mmlu_test", MMLU | {"choices": ["A"]}, "2: field 'choices' must be 2 to 26 texts"),
        ("hrm_arc_challenge", "arc_challenge_test", {"choices": {}, "answerKey": "A"}, "2: field 'choices' must hold"),
        ("hrm_drop", "drop_validation", {"answer": {}, "validated_answers": {}}, "2: field 'answer' must be an answer"),
    ],
)
def test_bad_row_is_named_by_file_and_line(
    task: str, file: str, line: Any, message: str, subject_folder: Path, tmp_path: Path
) -> None:
    for path in subject_folder.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    good = (tmp_path / f"{file}.jsonl").read_text().splitlines()[0]
    if file == "mmlu_test":  # the subject that is loaded first
        line["subject"] = json.loads(good)["subject"]
    bad = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / f"{file}.jsonl").write_text(f"{good}\n{bad}\n")
    with pytest.raises(ValueError) as caught:
        loaded(task, tmp_path)
    assert message in str(caught.value)


def test_missing_file_and_missing_shots_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data-dir: .* has no math_test.jsonl or math500_test.jsonl"):
        loaded("hrm_math", tmp_path)
    (tmp_path / "drop_validation.jsonl").write_text(json.dumps(drop_row("p", "q")))
    (tmp_path / "drop_train.jsonl").write_text(json.dumps(drop_row("p", "q")))
    with pytest.raises(ValueError, match="drop: the shot 'How many points"):
        loaded("hrm_drop", tmp_path)


def test_all_shared_rows_load(data: Path) -> None:
    """Lengths and limits of the rows in the shared data, with nano's tokenizer."""
    counts = {name: len(task.eval_docs) for name, task in loaded("hrm_gsm8k", data).items()}
    counts |= {name: len(task.eval_docs) for name, task in loaded("hrm_math", data).items()}
    subjects = loaded("hrm_mmlu", data)
    assert counts == {"hrm_gsm8k": 1319, "hrm_math": 500}
    assert sum(len(task.eval_docs) for task in subjects.values()) == 1405 and len(subjects) == 57
