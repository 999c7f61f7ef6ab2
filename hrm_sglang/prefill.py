"""Steps with prompts in them on the fused kernels: SGLang's attention, and our kernels between its GEMMs.

With FA3, steps of few tokens replay CUDA graphs of the whole model, captured when SGLang captures decode steps.
"""

import logging
from typing import Any

import torch

from hrm_sglang.decode import Decoder, attention_backend
from hrm_text.kernels.pointwise import PrefillBatch
from hrm_text.kernels.prefill import Attend, FusedPrefill
from hrm_text.kernels.prefill_graphs import SIZES, Kind, PrefillGraphs, Sequences, empty_inputs

logger = logging.getLogger("sglang.srt.hrm_sglang")

MOST_SEQUENCES = 256  # of a graph
KINDS: tuple[Kind, ...] = ("fresh", "cached", "causal")  # pages of one token are slow to read


class Prefiller:
    """Runs extend batches where the decoder's kernels are on.

    Args:
        decoder: of the same model; decides for both.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._prefill = FusedPrefill(decoder.body)
        self._asked = False
        self.graphs: PrefillGraphs | None = None

    def recur(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> torch.Tensor | None:
        """z_H after the last step; None where SGLang's own layers have to run the batch."""
        decoder = self._decoder
        if not forward_batch.forward_mode.is_extend_without_speculative() or decoder.chosen(positions.device) is None:
            return None
        slots = forward_batch.out_cache_loc
        if self.graphs is not None:
            sequences = attention_backend("prefill").sequences(len(input_ids))
            replayed = self.graphs.replay(input_ids, positions, slots, sequences)
            if replayed is not None:
                return replayed

        def attend(slot: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return decoder.layers[slot](q, k, v, forward_batch, save_kv_cache=False)

        batch = PrefillBatch(positions, slots, 1, decoder.cos_sin())
        z_H, z_L = decoder.body.begin(decoder.body.embed(input_ids))
        return self._prefill(z_H, z_L, batch, decoder.caches, attend, rows_read(forward_batch))

    def capture(self) -> None:
        """Capture graphs, where SGLang is about to capture its first one of a decode step and there is memory."""
        if self._asked:
            return
        from sglang.srt.model_executor.runner import get_is_capture_mode
        from sglang.srt.runtime_context import get_server_args

        if not get_is_capture_mode() or torch.cuda.is_current_stream_capturing():
            return
        self._asked = True
        backend, decoder = attention_backend("prefill"), self._decoder
        if not hasattr(backend, "sequences"):
            return

        def attention(sequences: Sequences, size: int, kind: Kind) -> Attend:
            return lambda slot, q, k, v: backend.attend(slot, (q, k, v), sequences, size, kind)

        longest = max(get_server_args().context_length or 0, decoder.body.shape.max_positions)
        inputs = empty_inputs(SIZES[-1], MOST_SEQUENCES, longest, 1, decoder.cos_sin())
        graphs = PrefillGraphs(self._prefill, *inputs, decoder.caches, attention, list(SIZES), KINDS)
        try:
            graphs.capture(torch.cuda.graph_pool_handle())
        except RuntimeError as error:  # also out of memory, and CUDA's errors
            logger.warning("HRM-Text: no graphs of steps with prompts, which take longer to launch without: %s", error)
            return
        self.graphs = graphs
        logger.info("HRM-Text: %s", graphs)


def rows_read(forward_batch: Any) -> torch.Tensor | None:
    """Rows of the final states that SGLang's LogitsProcessor (0.5.23) reads in an extend batch; None for all.

    It samples behind the last token of each sequence, and reads others where log-probs or hidden states are asked for,
    or where prompts are only scored.
    """
    if (
        forward_batch.return_logprob
        or forward_batch.is_prefill_only
        or forward_batch.capture_hidden_mode.need_capture()
        or forward_batch.extend_seq_lens is None
    ):
        return None
    return torch.cumsum(forward_batch.extend_seq_lens, 0) - 1
