"""Trains the demo checkpoint from scratch within a wall-clock budget.

    PYTHONPATH=shared python -m hrm_text.nano.train OUT --minutes 8

The recipe is the paper's in small: PrefixLM rows, loss on responses only, AdamW, backprop through the last recurrence
steps only (two at first, five from a fifth of the training on), and an average of the weights, which is what is saved.
"""

import argparse
import copy
import json
import math
import time
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
    # Inner steps with gradient in the last H cycle, and the share of training at which each begins. The two H steps
    # always have theirs, so 0 means two steps of backprop and 3 means five.
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
    """Compiles the two stacks. The cycle offset only numbers cache slots, and would ask for a graph a step."""
    for stack in (model.model.L_module, model.model.H_module):
        compiled = torch.compile(stack.forward, dynamic=False)

        def forward(hidden, attention_mask, position_embeddings, compiled=compiled, **_):  # type: ignore[no-untyped-def]
            return compiled(hidden, attention_mask=attention_mask, position_embeddings=position_embeddings)

        stack.forward = forward


def response_loss(model: HrmTextForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted mean cross-entropy of the response tokens; the residual stream is bf16, as it is when served."""
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


def save(
    folder: Path, model: HrmTextForCausalLM, averaged: list[torch.Tensor], log: dict[str, object]
) -> None:
    """Writes the averaged weights in bf16 under the published checkpoint's tensor names, and the training log."""
    copied = HrmTextForCausalLM(copy.deepcopy(model.config))
    for target, source in zip(copied.parameters(), averaged, strict=True):
        target.data.copy_(source)
    copied.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    copied.bfloat16().save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(log, indent=2) + "\n")


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(t.to(device, non_blocking=True) for t in batch))


def train(out: Path, tokenizer: Tokenizer, recipe: Recipe, device: torch.device) -> None:
    started = time.monotonic()
    on_gpu = device.type == "cuda"
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    config = nano_config(tokenizer.get_vocab_size())
    model = HrmTextForCausalLM._from_config(config, attn_implementation="sdpa").float().to(device).train()
    rows = PackedRows(tokenizer.to_str(), recipe.seed, recipe.rows, recipe.length)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=None, num_workers=recipe.workers, prefetch_factor=4, pin_memory=on_gpu
    )
    batches = iter(loader)
    optimizer = optimizer_for(model, recipe, fused=on_gpu)
    parameters = list(model.parameters())
    averaged = [p.detach().clone() for p in parameters]
    if on_gpu:
        torch.backends.cuda.enable_cudnn_sdp(False)  # the memory-efficient kernel takes the mask as it is
        compile_stacks(model)
    response_loss(
        model, to_device(next(batches), device)
    ).backward()  # compiles every graph before the clock starts
    optimizer.zero_grad()

    log: dict[str, object] = {"recipe": asdict(recipe), "parameters": sum(p.numel() for p in parameters)}
    losses: list[dict[str, float]] = []
    start, finish = time.monotonic(), started + 60 * recipe.minutes
    step, tokens, saved_at = 0, 0, start
    print(f"{log['parameters']:,} parameters, ready after {start - started:.0f} s", flush=True)
    while (now := time.monotonic()) < finish:
        progress = (now - start) / (finish - start)
        inner = [steps for begins, steps in recipe.backprop if begins <= progress][-1]
        model.model.L_bp_cycles_padded = [0, inner]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, progress)
        batch = to_device(next(batches), device)
        loss = response_loss(model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - min(recipe.ema, (1 + step) / (10 + step)))
        step, tokens = step + 1, tokens + batch.ids.numel()
        if step % 50 == 0:
            losses.append({"step": step, "loss": round(loss.item(), 4)})
            rate = tokens / (time.monotonic() - start)
            print(f"{step} loss {loss.item():.4f} norm {norm.item():.2f} steps of backprop {inner + 2} "
                  f"progress {progress:.3f} {rate:,.0f} tokens/s", flush=True)  # fmt: skip
        log |= {"steps": step, "tokens": tokens, "seconds": round(now - started), "loss": losses}
        if now - saved_at > 120:
            save(out, model, averaged, log)
            saved_at = now
    log["tokens_per_second"] = round(tokens / (time.monotonic() - start))
    if on_gpu:
        log["gpu"] = torch.cuda.get_device_name()
        log["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    print({k: v for k, v in log.items() if k != "loss"}, flush=True)
    save(out, model, averaged, log)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--rows", type=int, default=Recipe.rows)
    parser.add_argument("--workers", type=int, default=Recipe.workers)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, arguments.out)
    recipe = Recipe(**{k: v for k, v in vars(arguments).items() if k != "out"})
    train(arguments.out, tokenizer, recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
