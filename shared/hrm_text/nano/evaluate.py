"""Held-out exact match of a checkpoint per kind and condition, under the right prompt mask and a causal one.

    PYTHONPATH=shared python -m hrm_text.nano.evaluate CHECKPOINT eval.json

Answers are greedy, by transformers' `generate` with its KV cache. Two-turn items have two spans, which
`generate` cannot express; they are decoded by a full forward a token under the explicit 4-D mask.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import HrmTextForCausalLM

from hrm_text.nano.packing import Document, encode, prefix_mask
from hrm_text.nano.problems import GROUPS, Problem, final_answer, held_out
from hrm_text.nano.tokenizer import EOS, PAD

LONGEST = 160  # new tokens; the longest response of the generator has about 130


def prompt_of(document: Document) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids up to the last response, and the spans in them."""
    return document.ids[: document.responses[-1][0]], document.spans


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[list[int]], prefix: bool) -> list[list[int]]:
    """Greedy responses to single-span prompts, padded on the left; `prefix` False makes the prompt causal."""
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(p)) + p for p in prompts], device=model.device)
    real = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    types = {"token_type_ids": real} if prefix else {}
    out = model.generate(ids, attention_mask=real, max_new_tokens=LONGEST, do_sample=False, **types)
    return [row[: row.index(EOS)] if EOS in row else row for row in out[:, length:].tolist()]


@torch.inference_mode()
def decode_spans(
    model: Any, prompts: Sequence[tuple[list[int], list[tuple[int, int]]]], prefix: bool
) -> list[list[int]]:
    """Greedy responses to prompts with any number of spans: a full forward a token, padded on the right."""
    start = [len(ids) for ids, _ in prompts]
    shape = (len(prompts), max(start) + LONGEST)
    ids = torch.full(shape, PAD)
    spans = torch.full(shape, -1)
    for row, (prompt, bounds) in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        for number, (left, right) in enumerate(bounds if prefix else []):
            spans[row, left:right] = number
    ids, spans = ids.to(model.device), spans.to(model.device)
    at, rows = torch.tensor(start, device=model.device), torch.arange(len(prompts), device=model.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    allowed = prefix_mask(torch.zeros_like(spans), spans)
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=model.device).masked_fill_(~allowed, -torch.inf)
    for _ in range(LONGEST):
        seen = int(at.max())
        hidden = model.model(ids[:, :seen], attention_mask=mask[:, :, :seen, :seen], use_cache=False).last_hidden_state
        token = model.lm_head(hidden[rows, at - 1]).argmax(-1)
        done |= token == EOS
        if bool(done.all()):
            break
        ids[rows, at] = torch.where(done, PAD, token)
        at = at + (~done).long()
    return [ids[row, begin:end].tolist() for row, (begin, end) in enumerate(zip(start, at.tolist(), strict=True))]


def answer(model: Any, tokenizer: Tokenizer, problems: Sequence[Problem], prefix: bool, size: int) -> list[str]:
    """The model's whole responses, in the order of `problems`."""
    prompts = [prompt_of(encode(tokenizer, p)) for p in problems]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))  # alike lengths waste little padding
    responses = [""] * len(prompts)
    for chosen in batches(order, size):
        if any(len(prompts[i][1]) > 1 for i in chosen):
            ids = decode_spans(model, [prompts[i] for i in chosen], prefix)
        else:
            ids = generate(model, [prompts[i][0] for i in chosen], prefix)
        for i, row in zip(chosen, ids, strict=True):
            responses[i] = tokenizer.decode(row)
    return responses


def exact_match(problems: Sequence[Problem], responses: Sequence[str]) -> float:
    return sum(final_answer(r) == p.answer for p, r in zip(problems, responses, strict=True)) / len(problems)


def evaluate(folder: Path, device: str, size: int) -> dict[str, Any]:
    """Exact match of every group and both masks, with a few wrong answers to look at."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = HrmTextForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    results: list[dict[str, Any]] = []
    for kind, condition in GROUPS:
        problems, started = held_out(kind, condition), time.monotonic()
        row: dict[str, Any] = {"kind": kind, "condition": condition, "items": len(problems)}
        for name, prefix in (("prefix", True), ("causal", False)):
            responses = answer(model, tokenizer, problems, prefix, size)
            row[name] = round(exact_match(problems, responses), 4)
            if prefix:
                wrong = [(p, r) for p, r in zip(problems, responses, strict=True) if final_answer(r) != p.answer]
                row["wrong"] = [{"prompt": p.prompt, "expected": p.response, "got": r} for p, r in wrong[:4]]
        results.append(row)
        print(kind, condition, row["prefix"], row["causal"], f"{time.monotonic() - started:.0f} s", flush=True)
    return {"dtype": str(dtype).removeprefix("torch."), "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = evaluate(arguments.checkpoint, device, 600 if device == "cuda" else 50)
    arguments.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
