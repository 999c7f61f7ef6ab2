"""Trains the demo checkpoint from scratch within a wall-clock budget.

    PYTHONPATH=shared python -m hrm_text.nano.train OUT

The recipe is the paper's in small: PrefixLM rows, loss on responses only, AdamW, backprop through the last
recurrence steps only (two at first, five from a fifth of the training on), and an average of the weights, which
is what is saved.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import GenerationConfig, HrmTextConfig, HrmTextForCausalLM

from hrm_text.nano.packing import Batch, PackedRows, prefix_mask
from hrm_text.nano.tokenizer import BOS, EOS, PAD, save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the result, apart from the model's own configuration."""

    minutes: float = 7.4  # compilation included
    rows: int = 96
    length: int = 320  # tokens a row
    learning_rate: float = 2e-3
    warmup: float = 0.02  # share of the training
    weight_decay: float = 0.1
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 1
    workers: int = 12
    # Share of training, and inner steps with gradient in the last H cycle from there on. The two H steps always
    # have theirs, so 0 means two steps of backprop and 3 means five.
    backprop: tuple[tuple[float, int], ...] = ((0.0, 0), (0.067, 1), (0.133, 2), (0.2, 3))


def nano_config(vocab_size: int) -> HrmTextConfig:
    """The 1B checkpoint's shape in small; weights start at 1/sqrt(hidden_size), as there."""
    hidden = 256
    return HrmTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=64,
        H_cycles=2,
        L_cycles=3,
        L_bp_cycles=[0, 3],
        max_position_embeddings=1024,
        initializer_range=hidden**-0.5,
        embedding_scale=hidden**0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        prefix_lm=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, then a cosine to a fiftieth; `progress` runs from 0 to 1."""
    if progress < recipe.warmup:
        return recipe.learning_rate * max(progress / recipe.warmup, 0.01)
    left = 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - recipe.warmup) / (1 - recipe.warmup)))
    return recipe.learning_rate * (0.02 + 0.98 * left)


def compile_stacks(model: HrmTextForCausalLM) -> None:
    """Compiles the stacks. The cycle offset only numbers cache slots, and would ask for a graph a step."""
    for stack in (model.model.L_module, model.model.H_module):
        compiled = torch.compile(stack.forward, dynamic=False)

        def forward(hidden, attention_mask, position_embeddings, compiled=compiled, **_):  # type: ignore[no-untyped-def]
            return compiled(hidden, attention_mask=attention_mask, position_embeddings=position_embeddings)

        stack.forward = forward


def response_loss(model: HrmTextForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted mean cross-entropy of response tokens; the residual stream is bf16, as it is when served."""
    device = batch.ids.device
    allowed = prefix_mask(batch.documents, batch.spans)
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16, device=device).masked_fill_(~allowed, -torch.inf)
    # Without the cache of casts: a weight first cast under no_grad would be found there and get no gradient.
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        hidden = model.model(
            inputs_embeds=model.model.embed_tokens(batch.ids).bfloat16(),
            attention_mask=mask,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none")
    return (losses * batch.weights.flatten()).sum() / batch.weights.sum()


def optimizer_for(model: nn.Module, recipe: Recipe, fused: bool) -> torch.optim.AdamW:
    """Weight decay on the stacks' matrices, none on embeddings."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if "_module" in name]
    others = [p for name, p in trained if "_module" not in name]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)


def save(folder: Path, model: HrmTextForCausalLM, averaged: list[torch.Tensor], log: dict[str, object]) -> None:
    """Writes the averaged weights in bf16 under the published checkpoint's tensor names, and the log."""
    copied = HrmTextForCausalLM(copy.deepcopy(model.config))
    for target, source in zip(copied.parameters(), averaged, strict=True):
        target.data.copy_(source)
    copied.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    copied.bfloat16().save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(log, indent=2) + "\n")


def batches_for(tokenizer: Tokenizer, recipe: Recipe, device: torch.device) -> Iterator[Batch]:
    rows = PackedRows(tokenizer.to_str(), recipe.seed, recipe.rows, recipe.length)
    loader = torch.utils.data.DataLoader(
        rows,
        batch_size=None,
        num_workers=recipe.workers,
        prefetch_factor=4,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        yield Batch(*(t.to(device, non_blocking=True) for t in batch))


def inner_steps(recipe: Recipe, progress: float) -> int:
    """L steps of the last H cycle that get a gradient at this point of the training."""
    return [steps for begins, steps in recipe.backprop if begins <= progress][-1]


class Training:
    """The model in training, its optimiser, and the running average of its weights."""

    def __init__(self, recipe: Recipe, config: HrmTextConfig, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        torch.set_float32_matmul_precision("high")
        on_gpu = device.type == "cuda"
        model = HrmTextForCausalLM._from_config(config, attn_implementation="sdpa")
        self.recipe, self.model = recipe, model.float().to(device).train()
        self.optimizer = optimizer_for(self.model, recipe, fused=on_gpu)
        self.parameters = list(self.model.parameters())
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.steps = self.tokens = 0
        if on_gpu:
            torch.backends.cuda.enable_cudnn_sdp(False)  # the memory-efficient kernel takes the mask as it is
            compile_stacks(self.model)

    def warm_up(self, batch: Batch) -> None:
        """Compiles every graph: the configuration routes gradients through all five steps."""
        response_loss(self.model, batch).backward()
        self.optimizer.zero_grad()

    def update(self, batch: Batch, progress: float) -> torch.Tensor:
        """One optimiser step; returns the loss, still on the device."""
        self.model.model.L_bp_cycles_padded = [0, inner_steps(self.recipe, progress)]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, progress)
        loss = response_loss(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self.recipe.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.parameters, 1 - decay)
        self.steps, self.tokens = self.steps + 1, self.tokens + batch.ids.numel()
        return loss.detach()


def train(out: Path, tokenizer: Tokenizer, recipe: Recipe, device: torch.device) -> None:
    started = time.monotonic()
    run = Training(recipe, nano_config(tokenizer.get_vocab_size()), device)
    batches = batches_for(tokenizer, recipe, device)
    run.warm_up(next(batches))
    start, finish = time.monotonic(), started + 60 * recipe.minutes
    saved_at, losses = start, []
    log: dict[str, object] = {"recipe": asdict(recipe), "parameters": sum(p.numel() for p in run.parameters)}
    print(f"{log['parameters']:,} parameters, ready after {start - started:.0f} s", flush=True)
    while (now := time.monotonic()) < finish:
        progress = (now - start) / (finish - start)
        loss = run.update(next(batches), progress)
        seconds = time.monotonic() - start
        if run.steps % 50 == 0:
            losses.append({"step": run.steps, "loss": round(loss.item(), 4)})
            backprop = inner_steps(recipe, progress) + 2
            rate = f"{run.tokens / seconds:,.0f} tokens/s"
            print(f"{progress:.3f} step {run.steps} loss {loss:.4f} backprop {backprop} {rate}", flush=True)
        log |= {"steps": run.steps, "tokens": run.tokens, "seconds": round(seconds), "loss": losses}
        if now - saved_at > 120:
            save(out, run.model, run.averaged, log)
            saved_at = now
    log["tokens_per_second"] = round(run.tokens / (time.monotonic() - start))
    if device.type == "cuda":
        log["gpu"] = torch.cuda.get_device_name()
        log["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    print({k: v for k, v in log.items() if k != "loss"}, flush=True)
    save(out, run.model, run.averaged, log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--rows", type=int, default=Recipe.rows)
    parser.add_argument("--workers", type=int, default=Recipe.workers)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, arguments.out)
    recipe = Recipe(**{k: v for k, v in vars(arguments).items() if k != "out"})
    train(arguments.out, tokenizer, recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
