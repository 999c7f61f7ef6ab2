"""What runs an engine's decode steps, the fused kernels or its own layers: decided once, and said in one log line."""

import logging

import torch

from hrm_text.kernels.decode import FusedDecode, why_not
from hrm_text.model import HrmTextBody


def choose(
    body: HrmTextBody, dtype: torch.dtype, device: torch.device, engine: str, reason: str | None, logger: logging.Logger
) -> FusedDecode | None:
    """The fused kernels for `body`; None where the engine's layers have to run it.

    Args:
        body: with its weights loaded.
        dtype: of its activations.
        device: where they are.
        engine: name of the engine, for the log.
        reason: why the engine's side forbids them, if it does.
        logger: of the engine's adapter.
    """
    reason = reason or why_not(body, dtype)
    if reason is not None:
        logger.warning("HRM-Text: decode runs on %s's layers, not on the fused kernels: %s", engine, reason)
        return None
    logger.info("HRM-Text: decode runs on the fused kernels")
    return FusedDecode(body, device)
