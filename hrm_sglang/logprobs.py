"""Input log-probs: positions inside a span come back empty, as they do in vLLM.

The log-prob of a token inside a span is read where the model already sees the token, so it is no
prediction. Admission refuses requests that would get nothing else; here the holes are made. `sgl.select`
rests on them: it scores from the last token but one of what stands before a choice, which is inside the
span when that ends with the envelope, and takes the mean over the entries that are not empty.
"""

from collections.abc import Callable
from typing import Any

from hrm_sglang.spans import is_hrm_text, spans_of
from hrm_text.spans import LOGPROBS_OPTION, scored_inside

# Methods of `SchedulerLogprobResultProcessor`, and the lists of `req.logprob` that each fills with one entry a
# prompt token, from `logprob_start_len` on.
FILLED = {
    "_process_input_token_logprobs": ("input_token_logprobs_val",),
    "_process_input_top_logprobs": ("input_top_logprobs_val", "input_top_logprobs_idx"),
    "_process_input_token_ids_logprobs": ("input_token_ids_logprobs_val", "input_token_ids_logprobs_idx"),
}


def hiding(lists: tuple[str, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the methods of `FILLED`, which run once a request, when its prompt is through (SGLang 0.5.23)."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def process(self: Any, req: Any, *args: Any) -> None:
            original(self, req, *args)
            if is_hrm_text(self.model_config.hf_config) and not req.sampling_params.custom_params.get(LOGPROBS_OPTION):
                for name in lists:
                    _hide(req, getattr(req.logprob, name) or [])

        return process

    return make


def _hide(req: Any, entries: list[Any]) -> None:
    spans = spans_of(req)
    for index in range(len(entries)):
        if scored_inside(spans, req.logprob_start_len + index):
            entries[index] = None
