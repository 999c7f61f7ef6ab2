"""`make test`: each engine's suite in its own environment, and one verdict."""

from pathlib import Path

import pytest

import run_tests
import setup_env
from environment import Environment, Unavailable
from run_tests import SUITES, arguments_of, verdict

SGLANG = str(run_tests.SGLANG_TESTS)
TESTS, CORE = str(setup_env.ROOT / "tests"), str(setup_env.ROOT / "tests/core")


@pytest.mark.parametrize(
    ("words", "vllm", "sglang"),
    [
        ("", [TESTS], [SGLANG]),
        ("-k spans -x", ["-k", "spans", "-x", TESTS], ["-k", "spans", "-x", SGLANG]),
        ("-k tests", ["-k", "tests", TESTS], ["-k", "tests", SGLANG]),
        ("tests -q", [TESTS, "-q"], [SGLANG, "-q"]),
        ("tests/core -q", [CORE, "-q"], None),
        ("tests/sglang/test_keys.py::test_x[a::b]", None, [f"{SGLANG}/test_keys.py::test_x[a::b]"]),
        ("-v tests/core tests/sglang", ["-v", CORE], ["-v", SGLANG]),
        # pytest says itself that there is no such file.
        (
            "tests/none.py",
            ["tests/none.py", TESTS],
            ["tests/none.py", SGLANG],
        ),
    ],
)
def test_each_suite_gets_its_own_paths(words: str, vllm: list[str] | None, sglang: list[str] | None) -> None:
    assert arguments_of(SUITES["vllm"], words.split()) == vllm
    assert arguments_of(SUITES["sglang-cpu"], words.split()) == sglang


@pytest.mark.parametrize(
    ("vllm", "sglang", "code"), [(0, 0, 0), (0, 5, 0), (5, 0, 0), (5, 5, 5), (1, 0, 1), (0, 1, 1), (5, 1, 1), (0, 2, 2)]
)
def test_a_suite_in_which_nothing_is_selected_does_not_fail_the_other(vllm: int, sglang: int, code: int) -> None:
    assert verdict({"vllm": vllm, "sglang-cpu": sglang}) == code


def test_a_suite_that_cannot_run_here_is_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    env = Environment(tmp_path / "env")
    env.python = Path("true")  # ends with 0, as a pytest that passes

    def prepare(engine: str, dev: bool) -> Environment:
        if engine == "sglang-cpu":
            raise Unavailable("SGLang has no wheel for Python 3.14")
        return env

    monkeypatch.setattr(run_tests, "prepare", prepare)
    assert run_tests.run([]) == 0
    assert "sglang-cpu: LEFT OUT: SGLang has no wheel for Python 3.14\n" in capsys.readouterr().out
    assert run_tests.run(["tests/sglang"]) == run_tests.NOTHING_SELECTED, "asked for by name, it is no success"


@pytest.mark.parametrize("gpu", [False, True])
def test_two_tests_at_a_time_but_on_a_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env = Environment(tmp_path / "env")
    env.python = tmp_path / "python"
    env.python.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS" "$@" >> {tmp_path}/said\n')
    env.python.chmod(0o755)
    monkeypatch.setattr(run_tests, "prepare", lambda engine, dev: env)
    monkeypatch.setattr(run_tests, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_tests.run(["tests/core"]) == 0
    words = "7 -m pytest" if gpu else "1 -m pytest -n 2 --dist loadfile"
    assert (tmp_path / "said").read_text() == f"{words} {CORE}\n"
