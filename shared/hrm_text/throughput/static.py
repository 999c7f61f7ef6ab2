"""transformers as the yardstick: `generate` on one batch after the other, timed a token at a time.

    python -m hrm_text.throughput.static MODEL [--dummy]

It speaks as `drive.py` does. A request is {"prompts": FILE, "output": tokens, "batch": size, "ignore_eos": bool,
"score": bool, "limits": {...}}; the answer has the fields of `vllm bench serve`. transformers has neither a queue nor
a scheduler, so a batch's requests start and end together, and a batch has at most 64 of them.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy
import torch

from hrm_text.throughput.drive import serve

LARGEST_BATCH = 64


class Static:
    """A model, and batches through it."""

    def __init__(self, model: str, dummy: bool) -> None:
        from transformers import AutoConfig, AutoTokenizer, HrmTextForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        dtype = torch.bfloat16
        if dummy:
            with torch.device(self.device):
                loaded = HrmTextForCausalLM._from_config(AutoConfig.from_pretrained(model), dtype=dtype)
        else:
            loaded = HrmTextForCausalLM.from_pretrained(model, dtype=dtype)
        self.model = loaded.to(self.device).eval()

    def measure(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """All prompts of a file, batch by batch."""
        prompts = [json.loads(line)["prompt"] for line in Path(request["prompts"]).read_text().splitlines()]
        ids = [self.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
        size = min(request["batch"], LARGEST_BATCH)
        began = time.perf_counter()
        times: list[list[float]] = []
        for start in range(0, len(ids), size):
            times += self._batch(ids[start : start + size], request)
        seconds = time.perf_counter() - began
        return summary(times, sum(map(len, ids)), seconds, request["limits"])

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[list[int]], request: Mapping[str, Any]) -> list[list[float]]:
        """Seconds at which each request of a batch had each of its tokens; the batch starts at 0."""
        length = max(map(len, prompts))
        pad = self.model.config.pad_token_id
        began = time.perf_counter()
        ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=self.device)
        real = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        given = {"attention_mask": real, "token_type_ids": real}
        if request["score"]:
            self.model(ids, **given).logits.float().log_softmax(-1).argmax(-1).cpu()
            return [[time.perf_counter() - began] for _ in prompts]
        moments: list[float] = []

        def timed(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if self.device == "cuda":
                torch.cuda.synchronize()
            moments.append(time.perf_counter() - began)
            return scores

        least = request["output"] if request["ignore_eos"] else None
        out = self.model.generate(
            ids,
            **given,
            max_new_tokens=request["output"],
            min_new_tokens=least,
            do_sample=False,
            logits_processor=[timed],
        )[:, length:].tolist()
        end = self.model.config.eos_token_id
        counts = [len(row) if least or end not in row else row.index(end) + 1 for row in out]
        return [moments[:count] for count in counts]


def summary(times: Sequence[Sequence[float]], prompt_tokens: int, seconds: float, limits: Any) -> dict[str, Any]:
    """The fields of `vllm bench serve`, in milliseconds, from the moments of every request's tokens."""
    ttft = [1000 * moments[0] for moments in times]
    e2el = [1000 * moments[-1] for moments in times]
    tpot = [(last - first) / max(len(m) - 1, 1) for m, first, last in zip(times, ttft, e2el, strict=True)]
    itl = [1000 * (after - before) for m in times for before, after in pairwise(m)]
    generated = sum(map(len, times))
    # As `vllm bench serve` has it: a single token has no time per token.
    measured = {"ttft": ttft, "tpot": [t for t, m in zip(tpot, times, strict=True) if len(m) > 1]}
    measured |= {"itl": itl, "e2el": e2el}
    kept = [
        all(values[i] <= limits[name] for name, values in (("ttft", ttft), ("tpot", tpot)) if name in limits)
        for i in range(len(times))
    ]
    result: dict[str, Any] = {
        "completed": len(times),
        "failed": 0,
        "duration": seconds,
        "total_output_tokens": generated,
        "output_throughput": generated / seconds,
        "total_token_throughput": (generated + prompt_tokens) / seconds,
        "request_goodput": sum(kept) / seconds,
    }
    for name, values in measured.items():
        result[f"mean_{name}_ms"] = mean(values) if values else 0.0
        result[f"median_{name}_ms"] = median(values) if values else 0.0
        result[f"p99_{name}_ms"] = float(numpy.percentile(values, 99)) if values else 0.0
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dummy", action="store_true")
    arguments = parser.parse_args()
    serve(Static(arguments.model, arguments.dummy).measure)


if __name__ == "__main__":
    main()
