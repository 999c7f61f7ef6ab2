"""From problems to packed training rows: token ids, spans, documents, and the PrefixLM mask over them.

A turn is `<|im_start|>` condition prompt `<|im_end|>` (one bidirectional span, both markers included), then the
response and `<|box_end|>`, causal. Several documents share a row and do not see each other.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from hrm_text.nano.problems import Problem, training_stream
from hrm_text.nano.tokenizer import BOS, CONDITION_IDS, EOS, PAD, SPAN_END

POOL = 256  # documents to choose from when a row is filled


@dataclass(frozen=True)
class Document:
    """Token ids of one problem; `spans` are half-open (start, end), `responses` likewise."""

    ids: list[int]
    spans: list[tuple[int, int]]
    responses: list[tuple[int, int]]


class Batch(NamedTuple):
    """Packed rows, each array [rows, length]."""

    ids: torch.Tensor  # int64
    positions: torch.Tensor  # int64, restart with each document
    documents: torch.Tensor  # int64, unlike inside a row means invisible; each pad token is a document of its own
    spans: torch.Tensor  # int64, the span a token lies in, -1 where it is causal
    targets: torch.Tensor  # int64, the next token
    weights: torch.Tensor  # float32, 0 except where the next token belongs to a response


def instruction(tokenizer: Tokenizer, condition: str, prompt: str) -> list[int]:
    """The span of one instruction."""
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    return [BOS, *CONDITION_IDS[condition], *prompt_ids, SPAN_END]


def encode(tokenizer: Tokenizer, problem: Problem) -> Document:
    ids: list[int] = []
    spans, responses = [], []
    for turn in problem.turns:
        start = len(ids)
        ids += instruction(tokenizer, problem.condition, turn.prompt)
        spans.append((start, len(ids)))
        start = len(ids)
        ids += [*tokenizer.encode(turn.response, add_special_tokens=False).ids, EOS]
        responses.append((start, len(ids)))
    return Document(ids, spans, responses)


def fill_row(pool: list[Document], length: int) -> list[Document]:
    """Takes documents out of `pool` (sorted by length): the longest that still fits, until none does."""
    row: list[Document] = []
    room = length
    while pool:
        place = bisect_right(pool, room, key=lambda d: len(d.ids)) - 1
        if place < 0:
            break
        row.append(pool.pop(place))
        room -= len(row[-1].ids)
    return row


def pack(rows: list[list[Document]], length: int) -> Batch:
    """Lays out documents side by side.

    A response of n tokens weighs n ** 0.25 in all, so that a bare letter still counts beside worked steps.
    """
    shape = (len(rows), length)
    ids: NDArray[np.int64] = np.full(shape, PAD, np.int64)
    positions, spans = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    documents = np.tile(-1 - np.arange(length, dtype=np.int64), (len(rows), 1))
    targets, weights = np.full(shape, PAD, np.int64), np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        at = span = 0
        for number, document in enumerate(row):
            end = at + len(document.ids)
            ids[r, at:end] = document.ids
            positions[r, at:end] = np.arange(end - at)
            documents[r, at:end] = number
            for start, stop in document.spans:
                spans[r, at + start : at + stop] = span
                span += 1
            for start, stop in document.responses:
                targets[r, at + start - 1 : at + stop - 1] = document.ids[start:stop]
                weights[r, at + start - 1 : at + stop - 1] = (stop - start) ** -0.75
            at = end
    return Batch(*(torch.from_numpy(a) for a in (ids, positions, documents, spans, targets, weights)))


def prefix_mask(documents: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """[rows, length] twice -> bool [rows, 1, length, length]: query i may see key j."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    same_span = (spans[:, :, None] == spans[:, None, :]) & (spans[:, :, None] >= 0)
    same_document = documents[:, :, None] == documents[:, None, :]
    return (same_document & (causal | same_span))[:, None]


class PackedRows(torch.utils.data.IterableDataset[Batch]):
    """Endless batches; each loader worker has a seed, and so a stream, of its own."""

    def __init__(self, tokenizer_json: str, seed: int, rows: int, length: int) -> None:
        self.tokenizer_json, self.seed, self.rows, self.length = tokenizer_json, seed, rows, length

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        problems = training_stream(self.seed, info.id if info else 0)
        # Few-shot prompts longer than a row are left out.
        documents = (d for d in (encode(tokenizer, p) for p in problems) if len(d.ids) <= self.length)
        pool: list[Document] = []
        while True:
            rows = []
            for _ in range(self.rows):
                pool = sorted([*pool, *islice(documents, POOL - len(pool))], key=lambda d: len(d.ids))
                rows.append(fill_row(pool, self.length))
            yield pack(rows, self.length)
