"""Spans of an SGLang request: the core's one function at admission, its result everywhere else."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from hrm_text.spans import SPANS_OPTION, Spans, parse_spans

# Requests of this process's scheduler; an attention backend knows the rows of a batch by request id only.
_requests: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()
_ATTRIBUTE = "_hrm_text_spans"


def is_hrm_text(hf_config: Any) -> bool:
    """Whether a Hugging Face config is an HRM-Text's."""
    return getattr(hf_config, "model_type", None) == "hrm_text"


def registering(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `Req.__init__` (SGLang 0.5.23): keeps the request findable by its id for as long as it lives."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _requests[self.rid] = self

    return __init__


def spans_of(req: Any) -> Spans:
    """Spans of a scheduler's `Req`, as admission wrote them into its `custom_params`.

    Raises:
        RuntimeError: the request did not pass admission.
    """
    cached = getattr(req, _ATTRIBUTE, None)
    if cached is not None:
        return cached
    params = getattr(req.sampling_params, "custom_params", None)
    flat = (params or {}).get(SPANS_OPTION)
    if flat is None:
        raise RuntimeError(
            f"hrm_sglang: request {req.rid} came without its spans; the admission hook was bypassed, "
            "so its prompt would be masked wrongly"
        )
    spans = parse_spans(flat, max([len(req.origin_input_ids), *flat[1::2]]))
    # A request that SGLang has to abort keeps its place with a prompt of one token.
    spans = tuple(span for span in spans if span[1] <= len(req.origin_input_ids))
    setattr(req, _ATTRIBUTE, spans)
    return spans


def spans_of_rows(rids: Iterable[str]) -> list[Spans]:
    """Spans of a batch's rows, in order.

    Raises:
        RuntimeError: a row's request is not known here.
    """
    rows = []
    for rid in rids:
        req = _requests.get(rid)
        if req is None:
            raise RuntimeError(f"hrm_sglang: request {rid} is in the batch and its spans are not known")
        rows.append(spans_of(req))
    return rows
