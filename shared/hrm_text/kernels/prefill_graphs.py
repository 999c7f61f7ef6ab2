"""CUDA graphs of whole steps with prompts in them, for the sizes at which launching 1,300 kernels takes longest.

A graph reads a step's tokens and sequences from buffers of its own. Each size has one for each kind of step. "cached":
one attention call a layer, not causal, over pages, runs every step without causal pieces of several tokens. "causal":
any other takes a causal call as well, over the same sequences, and each token's result from the call that is its own.
"fresh", where the engine's pages are slow to read: spans that are all there attend to the step's own keys. The engine
supplies the calls.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hrm_text.kernels.decode import KVCaches
from hrm_text.kernels.pointwise import PrefillBatch
from hrm_text.kernels.prefill import Attend, FusedPrefill

Kind = Literal["fresh", "cached", "causal"]
# Up to 2,560 tokens a step takes longer to launch than to run. From 256 on it takes as long as it has tokens, in tiles
# of 128: a round number of them and an envelope find one that is a tile longer.
SIZES = (16, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1152, 1536, 1792, 2048, 2176, 2560)


@dataclass(frozen=True)
class Sequences:
    """What attention sees of a step: queries that follow one another, each sequence's KV in pages.

    Attributes:
        query_start: int32 (sequences + 1,), offsets of their query tokens.
        lengths: int32 (sequences,), KV tokens that each sees.
        table: int32 (sequences, pages).
        causal: bool (tokens,), the tokens of causal sequences; None where no such sequence has several tokens.
        fresh: whether no sequence has KV of earlier steps.
    """

    query_start: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    causal: torch.Tensor | None
    fresh: bool = False


class PrefillGraphs:
    """Captures steps of some sizes, and replays them for steps of fewer tokens.

    Args:
        prefill: runs the steps.
        batch: the graphs' own tensors, as long as the longest of them: what they read of a step's tokens.
        sequences: the same for its sequences.
        caches: (k_cache, v_cache) of a KV slot.
        attention: makes, inside of a graph, the call of a kind over sequences of a step of so many tokens.
        sizes: tokens of the graphs, none longer than `batch`.
        kinds: of the graphs.
    """

    def __init__(
        self,
        prefill: FusedPrefill,
        batch: PrefillBatch,
        sequences: Sequences,
        caches: KVCaches,
        attention: Callable[[Sequences, int, Kind], Attend],
        sizes: list[int],
        kinds: tuple[Kind, ...] = ("cached", "causal"),
    ) -> None:
        self._prefill, self._batch, self._sequences = prefill, batch, sequences
        self._caches, self._attention, self._sizes, self._kinds = caches, attention, sorted(sizes), kinds
        self._ids = torch.zeros_like(batch.positions)
        self._graphs: dict[tuple[int, Kind], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._bound = self._bound_caches()

    def __str__(self) -> str:
        return f"graphs of steps with prompts: {len(self._graphs)}, up to {self._sizes[-1]} tokens"

    def _bound_caches(self) -> list[tuple[int, torch.Size]]:
        ends = self._caches(0), self._caches(self._prefill.body.shape.plan.num_slots - 1)
        return [(k_cache.data_ptr(), k_cache.shape) for k_cache, _ in ends]

    def stale(self) -> bool:
        """Whether the engine has bound other KV caches since, as vLLM does after its memory profile."""
        return self._bound != self._bound_caches()

    def capture(self, pool: Any) -> None:
        """Capture every size, the largest first, so that the others fit into its memory."""
        with no_collection():
            for size in reversed(self._sizes):
                for kind in self._kinds:
                    self._run(size, kind, self._prefill.one_layer)  # loads the kernels that cuBLAS has for this size
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        z_H = self._run(size, kind, self._prefill)
                    self._graphs[size, kind] = graph, z_H

    def replay(
        self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, sequences: Sequences
    ) -> torch.Tensor | None:
        """z_H of a step, valid until the next; None where no graph is large enough.

        Args:
            ids, positions, slots: (tokens,) each.
            sequences: of these tokens.
        """
        size = next((size for size in self._sizes if size >= len(ids)), None)
        if size is None or len(sequences.lengths) > self._most_sequences(size):
            return None
        self._fill(ids, positions, slots, sequences)
        fresh = sequences.fresh and "fresh" in self._kinds
        kind: Kind = "causal" if sequences.causal is not None else "fresh" if fresh else "cached"
        graph, z_H = self._graphs[size, kind]
        graph.replay()
        return z_H[: len(ids)]

    def _most_sequences(self, size: int) -> int:
        return min(size, len(self._sequences.lengths))

    def _fill(self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, sequences: Sequences) -> None:
        """The rest is padding, whose KV is written nowhere."""
        batch, own, tokens, count = self._batch, self._sequences, len(ids), len(sequences.lengths)
        self._ids[:tokens].copy_(ids)
        batch.positions[:tokens].copy_(positions)
        batch.write_slots[:tokens].copy_(slots)
        batch.write_slots[tokens:].fill_(-1)
        own.query_start[: count + 1].copy_(sequences.query_start[: count + 1])
        own.query_start[count + 1 :].fill_(tokens)
        own.lengths[:count].copy_(sequences.lengths)
        own.lengths[count:].fill_(0)
        pages = min(own.table.shape[1], sequences.table.shape[1])
        own.table[:count, :pages].copy_(sequences.table[:count, :pages])
        if sequences.causal is not None:
            assert own.causal is not None
            own.causal[:tokens].copy_(sequences.causal)

    def _run(self, size: int, kind: Kind, run: Callable[..., torch.Tensor]) -> torch.Tensor:
        batch, own, count, body = self._batch, self._sequences, self._most_sequences(size), self._prefill.body
        sequences = Sequences(own.query_start[: count + 1], own.lengths[:count], own.table[:count], own.causal)
        step = PrefillBatch(batch.positions[:size], batch.write_slots[:size], batch.page_size, batch.cos_sin)
        attend = self._attention(sequences, size, "fresh" if kind == "fresh" else "cached")
        if kind == "causal":
            attend = self._each_its_own(attend, self._attention(sequences, size, kind), size)
        z_H, z_L = body.begin(body.embed(self._ids[:size]))
        return run(z_H, z_L, step, self._caches, attend)

    def _each_its_own(self, other: Attend, causal: Attend, size: int) -> Attend:
        assert self._sequences.causal is not None
        which = self._sequences.causal[:size, None, None]
        return lambda *step: torch.where(which, causal(*step), other(*step))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Nothing is collected meanwhile: freeing an earlier graph is not permitted in a capture, and ends it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def empty_inputs(
    tokens: int, count: int, length: int, page_size: int, cos_sin: torch.Tensor
) -> tuple[PrefillBatch, Sequences]:
    """Padding, for graphs to read: `tokens` in up to `count` sequences of up to `length` tokens."""

    def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=cos_sin.device)

    slots = torch.full((tokens,), -1, dtype=torch.int64, device=cos_sin.device)
    batch = PrefillBatch(zeros(tokens, dtype=torch.int64), slots, page_size, cos_sin)
    table, causal = zeros(count, -(-length // page_size)), zeros(tokens, dtype=torch.bool)
    return batch, Sequences(zeros(count + 1), zeros(count), table, causal)
