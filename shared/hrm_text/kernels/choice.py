"""What runs an engine's decode steps, the fused kernels or its own layers: decided once, and said in one log line."""

import logging
from typing import TYPE_CHECKING

import torch

from hrm_text.kernels.launch import why_off
from hrm_text.model import HrmTextBody

if TYPE_CHECKING:  # it imports Triton, which an engine on a CPU need not have
    from hrm_text.kernels.decode import FusedDecode


def prepare(body: HrmTextBody) -> None:
    """Begin what `choose` will wait for, where it is to choose the fused kernels; at once.

    Args:
        body: with its weights on their device, loaded or not.
    """
    if why_off(next(body.parameters()).device) is None:
        from hrm_text.kernels.ahead import begin_compiling

        begin_compiling(body)


def choose(
    body: HrmTextBody, dtype: torch.dtype, device: torch.device, engine: str, reason: str | None, logger: logging.Logger
) -> "FusedDecode | None":
    """The fused kernels for `body`; None where the engine's layers have to run it.

    Args:
        body: with its weights loaded.
        dtype: of its activations.
        device: where they are.
        engine: name of the engine, for the log.
        reason: why the engine's side forbids them, if it does.
        logger: of the engine's adapter.
    """
    off = why_off(device)
    if off is None:
        from hrm_text.kernels.decode import FusedDecode, why_not

        reason = reason or why_not(body, dtype)
        if reason is None:
            fused = FusedDecode(body, device)
            staged, streamed = fused.why_not_staged, fused.why_not_streamed
            how = "weights staged in shared memory" if staged is None else f"Triton's alone, for {staged}"
            if streamed and not staged:
                how += f"; from 9 tokens on Triton's, for {streamed}"
            if fused.attention.why_not_cuda and not staged:
                how += f"; attention is Triton's, for {fused.attention.why_not_cuda}"
            logger.info("HRM-Text: decode runs on the fused kernels (%s)", how)
            return fused
    # A user who switched them off, or whose hardware has none, need not be warned.
    level = logging.WARNING if off is None else logging.INFO
    logger.log(level, "HRM-Text: decode runs on %s's layers, not on the fused kernels: %s", engine, off or reason)
    return None
