"""What `hrm-text bench` is made of: prompts, floors, metrics, records and reports."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hrm_text.config import read_config
from hrm_text.evaluation.rows import DataError
from hrm_text.names import nano_path
from hrm_text.output_folder import claim
from hrm_text.throughput.dummy import dummy_model
from hrm_text.throughput.engines import BenchError, find_machine, gpu_memory_mib, kv_tokens
from hrm_text.throughput.floor import Costs, Rates
from hrm_text.throughput.load import METRICS, Worker, read_metrics
from hrm_text.throughput.report import Report
from hrm_text.throughput.results import Record, Store
from hrm_text.throughput.static import summary
from hrm_text.throughput.tasks import make_task
from hrm_text.throughput.workloads import SIZES, Workload, WorkloadError, make_prompts

ROOT = Path(__file__).resolve().parents[2]
CONFIG_1B = ROOT / "benchmarks/hrm-text-1b"
SHAPE_1B = read_config(json.loads((CONFIG_1B / "config.json").read_text()))
H200 = Rates(4.3e12, 790e12)
SMOKE, SHORT = ({workload.name: workload for workload in SIZES[size].workloads} for size in ("smoke", "short"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(nano_path())


@pytest.mark.parametrize("name", [name for name in SMOKE if name != "gsm8k"])
def test_prompts_have_their_exact_length(name: str, tokenizer: Any) -> None:
    workload = SMOKE[name]
    prompts = make_prompts(workload, tokenizer, "a")
    assert prompts == make_prompts(workload, tokenizer, "a") != make_prompts(workload, tokenizer, "b")
    assert len(prompts.texts) == workload.groups * workload.each
    assert max(prompts.lengths) + workload.generated <= 1024
    if workload.kind == "turns":
        step = workload.prompt + workload.output
        expected = [workload.prompt + turn * step for turn in range(workload.each) for _ in range(workload.groups)]
    else:
        expected = [workload.prompt + (workload.output if workload.kind == "score" else 0)] * len(prompts.texts)
    assert list(prompts.lengths) == expected


def test_only_what_no_earlier_prompt_begins_with_is_fresh(tokenizer: Any) -> None:
    vote = make_prompts(Workload("v", "vote", 40, 8, 4, 2, 3), tokenizer, "a")
    # The second prompt opens as the first did, but that lies in a span that goes on otherwise.
    assert vote.fresh == (40, 1, 1, 40, 1, 1)
    turns = make_prompts(Workload("t", "turns", 40, 8, 1, 1, 3), tokenizer, "a")
    assert turns.fresh == (40, 48, 48)
    score = make_prompts(Workload("s", "score", 40, 4, 1, 1, 2), tokenizer, "a")
    assert score.fresh[0] == 44 and score.fresh[1] <= 4


def test_gsm8k_prompts_are_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "How many?"}\n{"question": "How few?"}\n')
    prompts = make_prompts(SMOKE["gsm8k"], tokenizer, "a", tmp_path)
    expected = "<|im_start|><|quad_end|><|object_ref_end|>How many?<|im_end|>"
    assert prompts.texts[0] == expected and len(prompts.texts) == 2
    with pytest.raises(WorkloadError, match=r"gsm8k: needs --data-dir, a folder with gsm8k_test.jsonl"):
        make_prompts(SMOKE["gsm8k"], tokenizer, "a")
    with pytest.raises(WorkloadError, match=r"nowhere has no gsm8k_test.jsonl"):
        make_prompts(SMOKE["gsm8k"], tokenizer, "a", tmp_path / "nowhere")
    with pytest.raises(WorkloadError, match=r"has no math_test.jsonl or math500_test.jsonl"):
        make_prompts(SHORT["math-all"], tokenizer, "a", tmp_path)


def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "How many?"}\n{"answer": "4"}\n')
    with pytest.raises(DataError, match=r"gsm8k_test.jsonl:2: field 'question' must be text, got None"):
        make_prompts(SHORT["gsm8k-all"], tokenizer, "a", tmp_path)


def test_whole_benchmarks_are_an_evaluation_s_prompts(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("lm_eval")
    from hrm_text.evaluation.tasks import load

    rows = [mmlu_row(subject, n) for subject in ("anatomy", "high_school_european_history") for n in range(6)]
    for name in ("mmlu_dev.jsonl", "mmlu_test_1in10.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "math500_test.jsonl").write_text('{"problem": "Two?", "solution": "\\\\boxed{2}"}\n')
    made = make_prompts(SHORT["mmlu-all"], tokenizer, "a", tmp_path)
    run: dict[str, Any] = {"path": "", "split": "test", "data_dir": str(tmp_path), "pretrained": "hrm-text-nano"}
    shots = {"anatomy": 5, "high_school_european_history": 3}
    choice: dict[str, Any] = {"condition": "direct", "context": 4096, "shots_split": "dev", **run}
    asked = [
        document["prompt"]
        for subject, count in shots.items()
        for document in load("mmlu", name=subject, shots=count, **choice)["test"]
    ]
    assert list(made.texts) == asked
    # They share their shots, but no cache can: question and shots are one span.
    assert made.fresh == made.lengths
    (problem,) = load("math", condition="synth,cot", context=3072, **run)["test"]
    assert make_prompts(SHORT["math-all"], tokenizer, "a", tmp_path).texts == (problem["prompt"],)


def mmlu_row(subject: str, number: int) -> dict[str, Any]:
    choices = [f"{number}", "four", "five", "six"]
    return {"subject": subject, "question": f"What is {number}?", "choices": choices, "answer": number % 4}


def test_prompts_that_do_not_fit_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": question} for question in ("How many?", "How " * 300, "How few?")]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make_task(SHORT["gsm8k-all"], tokenizer, 256, str(tmp_path))
    assert len(task.prompts.texts) == 2 and task.prompts.left_out == 1
    # Warmed up on as many prompts of that length, none of which is measured.
    assert len(task.warm_up.texts) == 2 and not set(task.warm_up.texts) & set(task.prompts.texts)
    with pytest.raises(ValueError, match="workloads: long needs 3104 positions, the model has 256"):
        make_task(SHORT["long"], tokenizer, 256, "")


@pytest.mark.parametrize("size", ["full", "short"])
def test_a_size_fits_the_1b(size: str, tokenizer: Any) -> None:
    for workload in SIZES[size].workloads:
        if not workload.given:
            few = make_prompts(replace(workload, groups=1), tokenizer, "a")
            assert max(few.lengths) + workload.generated <= SHAPE_1B.max_positions


def test_floor_of_the_1b_is_the_design_s() -> None:
    costs = Costs(SHAPE_1B, H200)
    assert costs.kv_bytes == 786_432
    assert costs.held_bytes == pytest.approx(2 * 1_182_795_264, rel=1e-4)
    # Weights once a stack call and the head once: 7.85 GB and 0.2 GB; KV grows with batch and context.
    assert costs.step(1, 192) == pytest.approx((7.852e9 + 0.201e9 + 192 * 786_432) / 4.3e12, rel=1e-3)
    assert 1000 * costs.step(64, 576) == pytest.approx(8.6, abs=0.1)
    # A prompt of 2048 tokens is bound by arithmetic: 2 FLOPs a weight and token, and the attention.
    flops = 2 * 2048 * 3.926e9 + 2 * 1536 * 65536 + 4 * 2048**2 * 1536 * 128
    assert costs.prefill([2048], [2048]) == pytest.approx(flops / 790e12, rel=1e-3)


def test_floor_of_a_workload() -> None:
    costs = Costs(SHAPE_1B, H200)
    floor = costs.floor([100] * 4, [100] * 4, 11, 2)
    assert floor.tpot == costs.step(2, 105.5)
    assert floor.e2el == pytest.approx(floor.ttft + 10 * floor.tpot)
    assert floor.output_rate == pytest.approx(44 / (costs.prefill([100] * 4, [100] * 4) + 20 * floor.tpot))
    assert costs.floor([1] * 4, [100] * 4, 11, 2).ttft <= floor.ttft


def answer(**changed: Any) -> dict[str, Any]:
    return {**dict.fromkeys(METRICS, 1.0), "completed": 4, "failed": 0, **changed}


def test_metrics_are_read_or_refused() -> None:
    assert read_metrics("w", 4, answer(extra="x")) == {**dict.fromkeys(METRICS, 1.0), "completed": 4.0}
    with pytest.raises(BenchError, match="w: 1 of 4 requests failed: Bad Request"):
        read_metrics("w", 4, answer(completed=3, failed=1, errors=["", "", "Trace\nBad Request", ""]))
    with pytest.raises(BenchError, match="w: the load generator gave no median_ttft_ms"):
        read_metrics("w", 4, answer(median_ttft_ms=None))


def test_summary_of_moments() -> None:
    times = [[0.1, 0.2, 0.4], [0.1, 0.2]]
    result = summary(times, 10, 0.5, {"ttft": 150, "tpot": 120})
    assert read_metrics("w", 2, result)["output_throughput"] == 10
    assert result["total_token_throughput"] == 30
    assert result["median_tpot_ms"] == pytest.approx(125) and result["p99_itl_ms"] == pytest.approx(198)
    assert result["median_e2el_ms"] == pytest.approx(300) and result["request_goodput"] == 2


def record(repeat: int, rate: float, engine: str = "vllm") -> Record:
    metrics = {**dict.fromkeys(METRICS, 50.0), "output_throughput": rate}
    return Record(engine, "chat-4", repeat, "bench", "serve", metrics, 10.0 + repeat, 100.0, 4096)


def test_records_outlive_the_process(tmp_path: Path) -> None:
    for repeat, rate in enumerate((100.0, 300.0, 110.0)):
        Store(tmp_path).add(record(repeat, rate))
    (tmp_path / "records/vllm.chat-4.3.json.part").write_text('{"engine": ')
    again = Store(tmp_path)
    assert again.records["vllm", "chat-4", 1] == record(1, 300.0)
    value = again.value("vllm", "chat-4", "output_throughput")
    assert value and (value.median, value.lowest, value.highest) == (110.0, 100.0, 300.0)
    assert again.value("transformers", "chat-4", "output_throughput") is None


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    claim(tmp_path, {"model": "a", "size": "smoke"}, BenchError)
    claim(tmp_path, {"model": "a", "size": "smoke"}, BenchError)
    with pytest.raises(BenchError, match="holds results of a run with size 'smoke', not 'full'"):
        claim(tmp_path, {"model": "a", "size": "full"}, BenchError)


def test_a_run_without_the_fused_kernels_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, {"model": "a"}, BenchError)
    monkeypatch.setenv("HRM_TEXT_KERNELS", "0")
    with pytest.raises(BenchError, match="holds results of a run with kernels 'default', not '0'"):
        claim(tmp_path, {"model": "a"}, BenchError)


def test_report_shows_each_time_beside_its_floor(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("matplotlib")
    store = Store(tmp_path)
    for repeat, rate in enumerate((100.0, 300.0, 110.0)):
        store.add(record(repeat, rate))
        store.add(replace(record(repeat, rate / 2, "vllm-in-tree"), kv_tokens=None))
    workload = SMOKE["chat-4"]
    prompts = make_prompts(workload, tokenizer, "a")
    run = {"model": "nano", "size": "smoke", "dummy": False, "limits_ms": {"ttft": 2000}}
    costs = Costs(SHAPE_1B, H200)
    report = Report(tmp_path, run, store, ["vllm-in-tree", "vllm"], {"chat-4": (workload, prompts)}, costs)
    report.write()
    assert all(path.stat().st_size for path in report.files)
    rows = [[cell.strip() for cell in line.split("|")] for line in report.markdown().splitlines()]
    (ours,) = [row for row in rows if row[1:3] == ["chat-4", "vllm"]]
    (floor,) = [row for row in rows if row[1:3] == ["chat-4", "*floor*"]]
    assert ours[9] == "110.0 (100.0–300.0)" and ours[5] == "50.00"
    assert floor[5] == f"{1000 * report.floor('chat-4').tpot:.2f}"
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written["records"]) == 6 and written["floors"]["chat-4"]["tpot"] == report.floor("chat-4").tpot


def test_a_worker_that_dies_is_one_line(tmp_path: Path) -> None:
    script = "print('{}', flush=True); input(); print('{\"error\": \"ValueError: x\"}', flush=True); input(); exit(3)"
    with Worker([sys.executable, "-c", script], tmp_path / "log", {}) as worker:
        with pytest.raises(BenchError, match=r"ValueError: x; see .*log"):
            worker.ask([])
        with pytest.raises(BenchError, match=r"died \(exit status 3\); see .*log"):
            worker.ask([])


def test_kv_tokens_are_in_the_logs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert kv_tokens("vllm", log) is None
    log.write_text("INFO CPU KV cache size: 32,768 tokens, Maximum concurrency\nmax_total_num_tokens=8192, chunked\n")
    assert kv_tokens("vllm", log) == 32768 and kv_tokens("sglang", log) == 8192


def test_memory_is_that_of_the_gpus_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As nvidia-smi answers where there are two.
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\ncase "$*" in *--id=1*) echo 700;; *) echo 5; echo 700;; esac\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_memory_mib() == 705
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_memory_mib() == 700


def test_interpreters_are_found_or_refused() -> None:
    assert find_machine({}).pythons["transformers"] == sys.executable
    with pytest.raises(BenchError, match="sglang-python: /nowhere has no sglang"):
        find_machine({"sglang": "/nowhere"})


def test_a_config_alone_is_enough_for_dummy_weights(tmp_path: Path) -> None:
    source = shutil.copytree(CONFIG_1B, tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(dummy_model(str(source), tmp_path / "out"))
    assert len(tokenizer) == SHAPE_1B.vocab_size
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [6]
    assert tokenizer.decode([60000]) and len(tokenizer.encode(tokenizer.decode([60000]))) >= 1
    assert dummy_model("hrm-text-nano", tmp_path / "out") == str(nano_path())
