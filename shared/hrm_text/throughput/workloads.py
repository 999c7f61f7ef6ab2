"""What the engines are asked to do: every workload as prompts in a file, the same bytes for all of them."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_text.envelope import ANSWER_END, IM_END, IM_START, wrap_prompt
from hrm_text.spans import Envelope, envelope_spans
from hrm_text.throughput.questions import BENCHMARKS, questions, why_missing

KINDS = ("single", "chat", "long", "vote", "turns", "score", *BENCHMARKS)
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
        prompt: tokens; of the context for `score`, of a user turn for `turns`; 0 for a benchmark's own prompts.
        output: tokens a request; tokens of a continuation for `score`, which generates one.
        concurrency: requests in flight.
        groups: prompts that share nothing; `each` requests come from one. Of a benchmark, rows; 0 for all of them.
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

    @property
    def given(self) -> bool:
        """Whether the prompts are a benchmark's."""
        return self.kind in BENCHMARKS


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


def _chat(output: int, levels: Sequence[int], waves: int, least: int) -> tuple[Workload, ...]:
    return tuple(Workload(f"chat-{n}", "chat", 512, output, n, max(waves * n, least)) for n in levels)


def _whole(output: int) -> tuple[Workload, ...]:
    """Every row of the benchmarks."""
    outputs = {"gsm8k": output, "math": output, "mmlu": 1}
    return tuple(Workload(f"{kind}-all", kind, 0, tokens, 256, 0) for kind, tokens in outputs.items())


SIZES = {
    "full": Size(
        (
            Workload("single", "single", 128, 256, 1, 8),
            *_chat(512, (1, 4, 16, 64, 256), waves=2, least=8),
            Workload("long", "long", 3072, 128, 8, 32),
            Workload("gsm8k", "gsm8k", 0, 512, 64, 256),
            Workload("vote", "vote", 256, 256, 16, 8, 16),
            Workload("turns", "turns", 256, 128, 16, 16, 5),
            Workload("score", "score", 1024, 4, 16, 64, 4),
            *_whole(512),
        ),
        {"ttft": 1000, "tpot": 50},
        3,
    ),
    # Where a GPU is lent by the minute: the same prompts, fewer, and shorter answers.
    "short": Size(
        (
            Workload("single", "single", 128, 64, 1, 3),
            *_chat(128, (1, 16, 64, 256), waves=1, least=3),
            Workload("long", "long", 3072, 32, 8, 8),
            Workload("gsm8k", "gsm8k", 0, 64, 64, 64),
            Workload("vote", "vote", 256, 64, 16, 1, 16),
            Workload("turns", "turns", 256, 32, 8, 8, 5),
            Workload("score", "score", 1024, 4, 16, 16, 4),
            *_whole(128),
        ),
        {"ttft": 1000, "tpot": 50},
        1,
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
        left_out: prompts that did not fit the model.
    """

    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    fresh: tuple[int, ...]
    left_out: int = 0

    def write(self, path: Path) -> None:
        """As `vllm bench serve --dataset-name custom` reads them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in self.texts))


def make_prompts(
    workload: Workload, tokenizer: Any, seed: str, data_dir: Path | None = None, room: int | None = None
) -> Prompts:
    """The requests of a workload; the same seed gives the same ones.

    Args:
        room: tokens that prompt and answer may have together; a benchmark's longer prompts are left out.

    Raises:
        WorkloadError: the rows it needs are not there.
        DataError: a row cannot be used.
    """
    maker = _Maker(tokenizer, random.Random(f"{seed} {workload.name}"))
    if workload.given:
        if data_dir is None:
            raise WorkloadError(f"{workload.name}: needs --data-dir, a folder with {workload.kind}_test.jsonl")
        if reason := why_missing(workload.kind, data_dir):
            raise WorkloadError(f"{workload.name}: {reason}")
        texts = questions(workload.kind, data_dir, workload.groups)
    elif workload.kind == "vote":
        texts = [text for _ in range(workload.groups) for text in [maker.turn(workload.prompt)] * workload.each]
    elif workload.kind == "turns":
        texts = list(_turns(workload, maker))
    elif workload.kind == "score":
        texts = list(_scored(workload, maker))
    else:
        texts = [maker.turn(workload.prompt) for _ in range(workload.groups)]
    made = list(zip(texts, maker.encode(texts), strict=True))
    if workload.given and room is not None:
        made = [(text, ids) for text, ids in made if len(ids) + workload.generated <= room]
    kept, tokens = [text for text, _ in made], [ids for _, ids in made]
    (start,), (end,) = maker.encode([IM_START, IM_END])
    fresh = _fresh(tokens, Envelope(start, end))
    return Prompts(tuple(kept), tuple(map(len, tokens)), tuple(fresh), len(texts) - len(kept))


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


class _Maker:
    """Random text of a given number of tokens."""

    def __init__(self, tokenizer: Any, rng: random.Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.envelope = self.count(wrap_prompt(""))
        self.lengths = {word: self.count(f" {word}") for word in WORDS}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of all texts at once, which takes a fraction of the time."""
        # Quietly: how long a prompt may be is checked by the model's own limit.
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return ids

    def count(self, text: str) -> int:
        return len(self.encode([text])[0])

    def turn(self, tokens: int) -> str:
        """A user turn in its envelope, markers counted."""
        return wrap_prompt(self.text(tokens - self.envelope))

    def text(self, tokens: int) -> str:
        """Words, then digits up to the exact length: a digit more is a token more, or none where digits merge."""
        words: list[str] = []
        length = 0
        while length < tokens - 4:
            word = self.rng.choice(WORDS)
            words.append(f" {word}")
            length += self.lengths[word]
        text = "".join(words)
        while (length := self.count(text)) > tokens:
            words.pop()
            text = "".join(words)
        while length < tokens:
            text += str(self.rng.randrange(10))
            length = self.count(text)
        return text


def _fresh(prompts: Sequence[Sequence[int]], envelope: Envelope) -> Iterator[int]:
    """Tokens of each prompt that no cache can have from those before it; a span's depend on the whole span."""
    seen: dict[Any, Any] = {}
    for ids in prompts:
        node, shared = seen, 0
        while shared < len(ids) and ids[shared] in node:
            node = node[ids[shared]]
            shared += 1
        for token in ids[shared:]:
            node = node.setdefault(token, {})
        shared = next((start for start, end in envelope_spans(ids, envelope) if start < shared < end), shared)
        # The last token is always computed: its output is the answer's first token.
        yield max(len(ids) - shared, 1)
