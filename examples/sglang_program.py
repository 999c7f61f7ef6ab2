"""An SGLang program for HRM-Text: `gen` works out a word problem, `select` answers a multiple-choice question.

    python -m sglang.launch_server --model-path hrm-text-nano
    python examples/sglang_program.py --url http://localhost:30000

`select` scores each choice behind the prompt. The prompt is one bidirectional span, which its envelope
(`wrap_prompt`) closes; a choice stands behind it and is read causally, token by token, as the model was trained.
"""

import argparse
from typing import Any

import sglang as sgl

from hrm_text.envelope import wrap_prompt

PROBLEM = "Tom has 3 boxes with 4 apples each. He gives away 5 apples. How many apples are left?"
QUIZ = "Which of these is a color?\nA. dog\nB. red\nC. apple\nD. chair\nAnswer with the letter."


@sgl.function
def solve(s: Any, problem: str) -> None:
    """Reason step by step; the answer ends at HRM-Text's own end token."""
    s += wrap_prompt(problem, "synth,cot")
    s += sgl.gen("answer", max_tokens=200, temperature=0)


@sgl.function
def choose(s: Any, question: str, choices: list[str]) -> None:
    """The choice that the model finds likeliest."""
    s += wrap_prompt(question, "direct")
    s += sgl.select("choice", choices=choices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:30000", help="of a running server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args().url))

    print(f"{PROBLEM}\n  {solve.run(PROBLEM)['answer']}\n")
    state = choose.run(QUIZ, list("ABCD"))
    means = state.get_meta_info("choice")["normalized_prompt_logprobs"]
    print(f"{QUIZ}\n  {state['choice']}")
    print("  mean log-probs: " + ", ".join(f"{letter} {mean:.2f}" for letter, mean in zip("ABCD", means, strict=True)))


if __name__ == "__main__":
    main()
