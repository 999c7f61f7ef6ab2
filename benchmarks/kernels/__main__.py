"""The fused decode kernels on one GPU, without an engine: every kernel's time and bandwidth, and whole decode steps.

    python -m benchmarks.kernels --out kernels.json            # --page 1 for SGLang's KV cache

The 1B's shape with random weights. A kernel is timed in a CUDA graph that calls it once for each of the 128 layer
calls of a step, over weights and KV caches as they alternate there, so that the L2 cache holds nothing that it would
not hold in a step. The floor is the bytes it must move at the bandwidth of a device-to-device copy in the same run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hrm_text.config import read_config
from hrm_text.kernels.attention import DecodeBatch
from hrm_text.kernels.decode import FusedDecode
from hrm_text.kernels.linear import MAX_TOKENS, small_linear
from hrm_text.kernels.staged import copies_for, in_blocks, staged_linear
from hrm_text.kernels.swiglu import scaled_swiglu
from hrm_text.model import Block, HrmTextBody
from hrm_text.plain import PlainLayers, rope_table

CONFIG = Path(__file__).parents[1] / "hrm-text-1b" / "config.json"
# Batch, tokens in each one's context
SHAPES = ((1, 192), (8, 192), (16, 192), (32, 576), (64, 576), (128, 288), (256, 288))
REPEATS = 30


def milliseconds(work: Callable[[], object]) -> float:
    """Median time of a CUDA graph of `work`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # where what it reads is made
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(3 + REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[REPEATS // 2]


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a kernel that copies two gigabytes."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: torch.neg(source, out=target)) / 1000)


class Model:
    """The 1B's body with random weights, and KV for one batch."""

    def __init__(self) -> None:
        self.shape = read_config(json.loads(CONFIG.read_text()))
        with torch.device("cuda"):
            self.body = HrmTextBody(self.shape, PlainLayers(), "model").to(torch.bfloat16)
        for parameter in self.body.parameters():
            parameter.data.normal_(0, 0.02)
        self.fused = FusedDecode(self.body, torch.device("cuda"))
        self.cos_sin = rope_table(self.shape).cuda()
        stacks = {"L": self.body.L_module, "H": self.body.H_module}
        self.calls: list[tuple[Block, int]] = [
            (block, self.shape.plan.slot(step, layer))
            for step, kind in enumerate(self.body.steps)
            for layer, block in enumerate(stacks[kind].layers)
        ]

    def place(self, tokens: int, context: int, page: int) -> None:
        """Room for `tokens` requests of `context` tokens each, their pages shuffled.

        Pages of one token lie as in SGLang's pool, in a flat table; longer ones as in vLLM's cache.
        """
        shape, pages = self.shape, -(-context // page)
        heads, head_dim, count = shape.num_heads, shape.head_dim, tokens * pages
        lines = (2, count, 1, heads, head_dim) if page == 1 else (count, heads, page, 2 * head_dim)
        self.cache = torch.randn(shape.plan.num_slots, *lines, device="cuda", dtype=torch.bfloat16)
        self.context, self.page, last = context, page, context - 1
        table = torch.randperm(count, device="cuda").int().view(tokens, pages)
        starts = torch.arange(tokens + 1, dtype=torch.int32, device="cuda") * context
        self.batch = DecodeBatch(
            positions=torch.full((tokens,), last, device="cuda"),
            write_slots=table[:, last // page].long() * page + last % page,
            table=table.flatten() if page == 1 else table,
            row_starts=starts if page == 1 else None,
            lengths=None if page == 1 else torch.full((tokens,), context, dtype=torch.int32, device="cuda"),
            page_size=page,
            cos_sin=self.cos_sin,
        )
        self.x = torch.randn(tokens, shape.hidden_size, device="cuda", dtype=torch.bfloat16)
        self.ids = torch.randint(shape.vocab_size, (tokens,), device="cuda")

    def caches(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a KV slot, (pages, page, heads, head_dim) each."""
        cache = self.cache[slot]
        k, v = cache if self.page == 1 else cache.transpose(1, 2).split(self.shape.head_dim, dim=-1)
        return k, v

    def step(self) -> torch.Tensor:
        """One decode step, without LM head."""
        return self.fused(self.ids, self.batch, self.caches)

    def kernels(self) -> dict[str, tuple[Callable[[Block, int], object], int]]:
        """What one layer call runs for this batch: each kernel, and the bytes it must move."""
        tokens, shape = len(self.x), self.shape
        hidden, wide = shape.hidden_size, shape.intermediate_size
        gqkv, act = self.x.repeat(1, 4).contiguous(), self.x.new_ones(tokens, wide)
        product = self.x.new_ones(tokens, 2 * wide)
        eps, attention, context = shape.rms_norm_eps, self.fused.attention, self.context
        project, few = self.fused.tiled(tokens), tokens <= MAX_TOKENS
        extra: dict[str, Any] = {} if few or project else {"x": self.x, "eps": eps}
        result: dict[str, tuple[Callable[[Block, int], object], int]] = {
            "attention": (
                lambda block, slot: attention(gqkv, *self.caches(slot), self.batch, **extra),
                2 * tokens * (2 * context * hidden + 5 * hidden),
            )
        }
        sizes = {
            name: 2 * (rows * width + tokens * (rows + width))
            for name, rows, width in (
                ("gqkv", 4 * hidden, hidden),
                ("o", hidden, hidden),
                ("gate_up", 2 * wide, hidden),
                ("down", hidden, wide),
            )
        }
        linear = torch.nn.functional.linear
        kernels: dict[str, Callable[[Block, int], object]]
        if self.fused.staged(tokens):
            copies = copies_for(tokens)
            x, wide_x = (in_blocks(each).repeat(copies, 1, 1, 1) for each in (self.x, act))
            extra["copies"], gate_up = copies, {"norm_eps": eps, "swiglu": True, "copies": copies}
            kernels = {
                "gqkv": lambda b, _: staged_linear(x, b.self_attn.gqkv_proj.weight, norm_eps=eps),
                "o": lambda b, _: staged_linear(x, b.self_attn.o_proj.weight, residual=x, copies=copies),
                "gate_up": lambda b, _: staged_linear(x, b.mlp.gate_up_proj.weight, **gate_up),
                "down": lambda b, _: staged_linear(wide_x, b.mlp.down_proj.weight, residual=x, copies=copies),
            }
        elif project:
            squares = project(self.x, self.calls[0][0].self_attn.o_proj.weight, residual=self.x)[1]
            norm = {"squares": squares, "eps": eps}
            kernels = {
                "gqkv": lambda b, _: project(self.x, b.self_attn.gqkv_proj.weight, **norm),
                "o": lambda b, _: project(self.x, b.self_attn.o_proj.weight, residual=self.x),
                "gate_up": lambda b, _: project(self.x, b.mlp.gate_up_proj.weight, swiglu=True, **norm),
                "down": lambda b, _: project(act, b.mlp.down_proj.weight, residual=self.x),
            }
        elif few:
            kernels = {
                "gqkv": lambda b, _: small_linear(self.x, b.self_attn.gqkv_proj.weight, norm_eps=eps),
                "o": lambda b, _: small_linear(self.x, b.self_attn.o_proj.weight, residual=self.x),
                "gate_up": lambda b, _: small_linear(self.x, b.mlp.gate_up_proj.weight, norm_eps=eps, swiglu=True),
                "down": lambda b, _: small_linear(act, b.mlp.down_proj.weight, residual=self.x),
            }
        else:
            kernels = {
                "gqkv": lambda b, _: linear(self.x, b.self_attn.gqkv_proj.weight),
                "o": lambda b, _: torch.addmm(self.x, self.x, b.self_attn.o_proj.weight.t()),
                "gate_up": lambda b, _: linear(self.x, b.mlp.gate_up_proj.weight),
                "down": lambda b, _: torch.addmm(self.x, act, b.mlp.down_proj.weight.t()),
            }
            result["swiglu"] = (lambda *_: scaled_swiglu(product, self.x, eps), 2 * tokens * (3 * wide + hidden))
        return result | {name: (kernel, sizes[name]) for name, kernel in kernels.items()}


def main(
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("kernels.json"),
    page: Annotated[int, typer.Option(help="Tokens a page of the KV cache: 16 is vLLM's, 1 SGLang's.")] = 16,
) -> None:
    """Time every kernel and every step, and print them beside their floors."""
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    model = Model()
    report: dict[str, Any] = {"copy_tb_s": bandwidth / 1e12, "page": page, "shapes": []}
    for tokens, context in SHAPES:
        model.place(tokens, context, page)
        step = milliseconds(model.step)
        rows = {}
        for name, (kernel, size) in model.kernels().items():
            each = 1000 * milliseconds(lambda kernel=kernel: [kernel(*call) for call in model.calls]) / len(model.calls)
            rows[name] = {"us": each, "bytes": size, "tb_s": size / each / 1e6, "floor_us": 1e6 * size / bandwidth}
        floor = len(model.calls) * sum(row["floor_us"] for row in rows.values()) / 1000
        report["shapes"].append({"batch": tokens, "context": context, "step_ms": step, "floor_ms": floor, "us": rows})
        out.write_text(json.dumps(report, indent=1))
        print(f"batch {tokens}, context {context}: step {step:.3f} ms, floor {floor:.3f} ms")
        for name, row in rows.items():
            print(f"  {name:10s} {row['us']:7.2f} us  {row['tb_s']:5.2f} TB/s  floor {row['floor_us']:6.2f} us")


if __name__ == "__main__":
    typer.run(main)
