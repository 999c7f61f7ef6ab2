"""Steps replayed from graphs. On a CPU they run again instead: what surrounds a graph is the same."""

import contextlib
import gc
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from hrm_text.kernels.prefill import Attend, FusedPrefill
from hrm_text.kernels.prefill_graphs import Kind, PrefillGraphs, Sequences, empty_inputs
from hrm_text.model import HrmTextBody
from hrm_text.oracle import token_logprobs
from hrm_text.plain import rope_table
from hrm_text.spans import Spans, pieces
from tests.kernels.conftest import DEVICE
from tests.kernels.test_decode import body as body

PAGE, PAGES, LENGTH = 4, 32, 16
SIZES = [8, 24]
KINDS: tuple[Kind, ...] = ("fresh", "cached", "causal")


class Graph:
    """Stands in for a CUDA graph: replaying runs the step again, into the tensor of the first time."""

    running: Any = None
    recorded: Any = None

    def replay(self) -> None:
        again, z_H = self.recorded
        z_H.copy_(again())


@contextlib.contextmanager
def recording(graph: Graph, pool: Any) -> Iterator[None]:
    Graph.running = graph
    yield
    Graph.running = None


class Recorded(PrefillGraphs):
    def _run(self, *step: Any) -> torch.Tensor:
        z_H = super()._run(*step)
        if Graph.running is not None:
            Graph.running.recorded = (lambda: PrefillGraphs._run(self, *step)), z_H
        return z_H


class Engine:
    """Serves prompts in steps over a paged cache."""

    def __init__(self, body: HrmTextBody, monkeypatch: pytest.MonkeyPatch) -> None:
        shape = body.shape
        self.body = body
        self.cache = torch.zeros(shape.plan.num_slots, 2, PAGES, PAGE, shape.num_heads, shape.head_dim, device=DEVICE)
        kind = PrefillGraphs
        if DEVICE == "cpu":
            monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
            monkeypatch.setattr(torch.cuda, "graph", recording)
            kind = Recorded
        inputs = empty_inputs(SIZES[-1], 6, LENGTH, PAGE, rope_table(shape).to(DEVICE))
        self.fresh = 0  # calls over a step's own keys
        self.graphs = kind(FusedPrefill(body), *inputs, self.caches, self.attention, SIZES, KINDS)
        self.graphs.capture(None)

    def caches(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.cache[slot]
        return k, v

    def attention(self, sequences: Sequences, size: int, kind: Kind) -> Attend:
        """By masks over the whole cache, so that a CUDA graph can have it."""

        def attend(slot: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if kind == "fresh":  # its own keys, wherever they lie in the step
                self.fresh += 1
                index = sequences.query_start[:-1, None] + torch.arange(LENGTH, device=DEVICE)
                keys, values = (each[index.long().clamp(max=size - 1)] for each in (k, v))
            else:
                keys, values = (cache[sequences.table.long()].flatten(1, 2) for cache in self.caches(slot))
            token, at = torch.arange(size, device=DEVICE), torch.arange(keys.shape[1], device=DEVICE)
            row = (token[:, None] >= sequences.query_start[None, 1:]).sum(1).clamp(max=len(sequences.lengths) - 1)
            last = sequences.lengths[row]
            if kind == "causal":
                last = last - (sequences.query_start[1:][row] - 1 - token)
            scores = torch.einsum("qhd,qkhd->hqk", q, keys[row]) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(at[None, :] >= last[:, None], -1e9).softmax(-1)
            return torch.einsum("hqk,qkhd->qhd", weights, values[row])

        return attend

    def step(self, rows: Sequence[tuple[list[int], Spans, int, int, int]]) -> torch.Tensor | None:
        """z_H of rows of (prompt, spans, context, end, first page)."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths, table, causal = [0], [], [], []
        for prompt, spans, context, end, page in rows:
            ids += prompt[context:end]
            positions += range(context, end)
            slots += range(page * PAGE + context, page * PAGE + end)
            for piece in pieces(spans, context, end):
                starts.append(starts[-1] + piece.end - piece.start)
                lengths.append(piece.end)
                table.append(list(range(page, page + LENGTH // PAGE)))
                causal += [not piece.bidirectional] * (piece.end - piece.start)

        def to(values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=DEVICE)

        mask = to(causal, torch.bool) if any(causal) else None
        fresh = mask is None and lengths == [end - start for start, end in itertools.pairwise(starts)]
        sequences = Sequences(to(starts), to(lengths), to(table), mask, fresh)
        tokens = [to(each, torch.int64) for each in (ids, positions, slots)]
        return self.graphs.replay(tokens[0], tokens[1], tokens[2], sequences)


@pytest.fixture
def engine(body: HrmTextBody, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(body, monkeypatch)


def test_steps_equal_the_oracle(engine: Engine, reference: Any) -> None:
    """Large steps and small ones in turn, spans and causal pieces, prompts in two steps."""
    body = engine.body
    generator = torch.Generator().manual_seed(5)
    spans: list[Spans] = [((0, 5),), ((0, 3), (6, 11)), (), ((2, 7),), ((0, 7),), ((0, 6),)]
    prompts = [torch.randint(12, body.shape.vocab_size, (11,), generator=generator).tolist() for _ in spans]
    pages = [0, 4, 8, 12, 16, 20]
    hidden: list[list[torch.Tensor]] = [[] for _ in prompts]
    schedule = [
        [(0, 0, 5), (1, 0, 6), (2, 0, 9)],
        [(0, 5, 6)],
        [(3, 0, 7)],
        [(4, 0, 7), (5, 0, 6)],
        [(1, 6, 11), (2, 9, 11)],
        [(0, 6, 11), (3, 7, 11)],
        [(4, 7, 11), (5, 6, 11)],
    ]
    captured = engine.fresh
    for step in schedule:
        z_H = engine.step([(prompts[row], spans[row], start, end, pages[row]) for row, start, end in step])
        assert z_H is not None and len(z_H) == sum(end - start for _, start, end in step)
        parts = z_H.clone().split([end - start for _, start, end in step])
        for (row, _, _), part in zip(step, parts, strict=True):
            hidden[row].append(part)
    for row, prompt in enumerate(prompts):
        logprobs = body.lm_head(torch.cat(hidden[row])).float().log_softmax(-1).cpu()
        got = logprobs[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0]
        expected = token_logprobs(reference, prompt, spans[row])
        assert float((got - expected).abs().max()) <= 1e-5, row
    if DEVICE == "cpu":  # where replays call it
        assert engine.fresh - captured == body.shape.plan.num_slots  # one step of them
    assert int((engine.cache[:, :, 24:] != 0).sum()) == 0  # padding is written nowhere


def test_steps_that_no_graph_runs(engine: Engine) -> None:
    """Too many tokens, or sequences."""
    prompt = list(range(20, 36))
    assert engine.step([(prompt, ((0, 13),), 0, 13, 0), (prompt, ((0, 12),), 0, 12, 4)]) is None
    single = [(prompt, (), index, index + 1, 0) for index in range(7)]
    assert engine.step(single) is None
    assert engine.step(single[:6]) is not None


def test_other_caches_are_noticed(engine: Engine) -> None:
    assert not engine.graphs.stale()
    engine.cache = engine.cache.clone()
    assert engine.graphs.stale()


def test_nothing_is_collected_during_a_capture(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier engine's graphs, freed then, would end the capture."""
    enabled: list[bool] = []

    def run(*step: Any) -> torch.Tensor:
        enabled.append(gc.isenabled())
        return torch.zeros(1)

    monkeypatch.setattr(engine.graphs, "_run", run)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    engine.graphs.capture(None)
    assert enabled and not any(enabled) and gc.isenabled()
