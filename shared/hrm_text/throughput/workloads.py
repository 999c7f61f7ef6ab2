"""What the engines are asked to do: every workload as prompts in a file, the same bytes for all of them."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_text.envelope import ANSWER_END, wrap_prompt

GSM8K_FILE = "gsm8k_test.jsonl"
KINDS = ("single", "chat", "long", "gsm8k", "vote", "turns", "score")
WORDS = tuple(
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will more no if out so what".split()
)


class WorkloadError(Exception):
    """A workload cannot be made; the message is one line that says why."""


@dataclass(frozen=True)
class Workload:
    """One measurement.

    Attributes:
        name: of the measurement, unique in a size: "chat-64".
        kind: a name in `KINDS`.
        prompt: tokens; of the context for `score`, of a user turn for `turns`; 0 for prompts as they are.
        output: tokens a request; tokens of a continuation for `score`, which generates one.
        concurrency: requests in flight.
        groups: prompts that share nothing; `each` requests come from one.
        each: samples, turns or continuations.
    """

    name: str
    kind: str
    prompt: int
    output: int
    concurrency: int
    groups: int
    each: int = 1

    @property
    def generated(self) -> int:
        """Tokens that the engine is asked for."""
        return 1 if self.kind == "score" else self.output


@dataclass(frozen=True)
class Size:
    """A set of workloads.

    Attributes:
        limits: in milliseconds; goodput counts the requests that keep them.
        repeats: starts of each engine.
        vllm_options: of vLLM's servers; none where speed is the point.
    """

    workloads: tuple[Workload, ...]
    limits: dict[str, float]
    repeats: int
    vllm_options: tuple[str, ...] = ()


def _chat(prompt: int, output: int, levels: Sequence[int]) -> tuple[Workload, ...]:
    return tuple(Workload(f"chat-{n}", "chat", prompt, output, n, max(2 * n, 8)) for n in levels)


SIZES = {
    "full": Size(
        (
            Workload("single", "single", 128, 256, 1, 8),
            *_chat(512, 512, (1, 4, 16, 64, 256)),
            Workload("long", "long", 3072, 128, 8, 32),
            Workload("gsm8k", "gsm8k", 0, 512, 64, 256),
            Workload("vote", "vote", 256, 256, 16, 8, 16),
            Workload("turns", "turns", 256, 128, 16, 16, 5),
            Workload("score", "score", 1024, 4, 16, 64, 4),
        ),
        {"ttft": 1000, "tpot": 50},
        3,
    ),
    "smoke": Size(
        (
            Workload("single", "single", 32, 32, 1, 2),
            Workload("chat-1", "chat", 48, 24, 1, 2),
            Workload("chat-4", "chat", 48, 24, 4, 8),
            Workload("long", "long", 384, 8, 2, 4),
            Workload("gsm8k", "gsm8k", 0, 16, 4, 8),
            Workload("vote", "vote", 48, 16, 4, 1, 8),
            Workload("turns", "turns", 48, 8, 2, 2, 5),
            Workload("score", "score", 96, 4, 4, 2, 4),
        ),
        {"ttft": 2000, "tpot": 200},
        1,
        # On a CPU, compiling the in-tree model takes longer than all the rest.
        ("--enforce-eager",),
    ),
}


@dataclass(frozen=True)
class Prompts:
    """The requests of a workload, and what they cost at the least.

    Attributes:
        texts: one a request, in the order in which they are sent.
        lengths: their tokens.
        fresh: the tokens of each that no earlier request begins with: what even a perfect cache must compute.
    """

    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    fresh: tuple[int, ...]

    def write(self, path: Path) -> None:
        """As `vllm bench serve --dataset-name custom` reads them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in self.texts))


def make_prompts(workload: Workload, tokenizer: Any, seed: str, data_dir: Path | None = None) -> Prompts:
    """The requests of a workload; the same seed gives the same ones.

    Raises:
        WorkloadError: the rows it needs are not there.
    """
    maker = _Maker(tokenizer, random.Random(f"{seed} {workload.name}"))
    if workload.kind == "gsm8k":
        texts = [wrap_prompt(question, "synth,cot") for question in _questions(data_dir, workload.groups)]
    elif workload.kind == "vote":
        texts = [text for _ in range(workload.groups) for text in [maker.turn(workload.prompt)] * workload.each]
    elif workload.kind == "turns":
        texts = list(_turns(workload, maker))
    elif workload.kind == "score":
        texts = list(_scored(workload, maker))
    else:
        texts = [maker.turn(workload.prompt) for _ in range(workload.groups)]
    ids = [maker.encode(text) for text in texts]
    return Prompts(tuple(texts), tuple(map(len, ids)), tuple(_fresh(ids)))


def _turns(workload: Workload, maker: "_Maker") -> Iterator[str]:
    """Turn by turn over all chats, with answers written beforehand: every engine continues the same history."""
    histories = [""] * workload.groups
    for _ in range(workload.each):
        for chat, history in enumerate(histories):
            asked = history + maker.turn(workload.prompt)
            yield asked
            histories[chat] = asked + maker.text(workload.output - 1) + ANSWER_END


def _scored(workload: Workload, maker: "_Maker") -> Iterator[str]:
    for _ in range(workload.groups):
        context = maker.turn(workload.prompt)
        for _ in range(workload.each):
            yield context + maker.text(workload.output)


def _questions(data_dir: Path | None, count: int) -> list[str]:
    if data_dir is None:
        raise WorkloadError(f"gsm8k: needs --data-dir, a folder with {GSM8K_FILE}")
    path = data_dir / GSM8K_FILE
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return [row["question"] for row in rows[:count]]
    except OSError as error:
        raise WorkloadError(f"data-dir: {path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise WorkloadError(f"data-dir: {path} is not GSM8K's rows ({type(error).__name__}: {error})") from None


class _Maker:
    """Random text of a given number of tokens."""

    def __init__(self, tokenizer: Any, rng: random.Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng

    def encode(self, text: str) -> list[int]:
        # Quietly: how long a prompt may be is checked by the model's own limit.
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def turn(self, tokens: int) -> str:
        """A user turn in its envelope, markers counted."""
        return wrap_prompt(self.text(tokens - len(self.encode(wrap_prompt("")))))

    def text(self, tokens: int) -> str:
        """Words, then digits up to the exact length: a digit more is a token more, or none where digits merge."""
        words: list[str] = []
        length = 0
        while length < tokens - 4:
            words.append(f" {self.rng.choice(WORDS)}")
            length += len(self.encode(words[-1]))
        text = "".join(words)
        while len(self.encode(text)) > tokens:
            words.pop()
            text = "".join(words)
        while len(self.encode(text)) < tokens:
            text += str(self.rng.randrange(10))
        return text


def _fresh(prompts: Sequence[Sequence[int]]) -> Iterator[int]:
    """Tokens of each prompt behind the longest beginning that it shares with one before it."""
    seen: dict[Any, Any] = {}
    for ids in prompts:
        node, shared = seen, 0
        while shared < len(ids) and ids[shared] in node:
            node = node[ids[shared]]
            shared += 1
        for token in ids[shared:]:
            node = node.setdefault(token, {})
        # The last token is always computed: its output is the answer's first token.
        yield max(len(ids) - shared, 1)
