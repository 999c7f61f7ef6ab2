"""The least time that a step, a prompt or a workload takes, from its bytes and FLOPs and the machine's rates."""

from collections.abc import Sequence
from dataclasses import dataclass

from hrm_text.config import HrmTextShape


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do in this run.

    Attributes:
        bandwidth: bytes a second, read plus written, of a copy as large as the weights.
        flops: a second, of a large matrix product in the weights' type.
    """

    bandwidth: float
    flops: float
    device: str = ""


@dataclass(frozen=True)
class Floor:
    """Floors of one workload with all its requests in flight: seconds, and output tokens a second as a ceiling."""

    ttft: float
    tpot: float
    e2el: float
    output_rate: float


class Costs:
    """Bytes and FLOPs of the model; weights and KV in `width` bytes each."""

    def __init__(self, shape: HrmTextShape, rates: Rates, width: int = 2) -> None:
        self.rates = rates
        attention = shape.num_heads * shape.head_dim
        block = shape.hidden_size * (5 * attention + 3 * shape.intermediate_size)
        calls = shape.plan.num_slots
        self.stacks = block * calls
        self.head = shape.hidden_size * shape.vocab_size
        self.weight_bytes = width * (self.stacks + self.head)
        self.kv_bytes = width * 2 * attention * calls
        # Two stacks, the embedding and the head.
        self.held_bytes = width * (2 * block * shape.plan.layers_per_stack + 2 * self.head)
        # One query against one key: a multiply-add for the score, one for the value, in every slot.
        self.pair_flops = 4 * attention * calls

    def step(self, batch: int, context: float) -> float:
        """Seconds of one decode step of `batch` requests with `context` tokens each."""
        moved = self.weight_bytes + batch * context * self.kv_bytes
        flops = batch * (2 * (self.stacks + self.head) + context * self.pair_flops)
        return self._seconds(moved, flops)

    def prefill(self, fresh: Sequence[int], lengths: Sequence[int]) -> float:
        """Seconds until prompts of `lengths` tokens have their first token, when only `fresh` ones are computed."""
        flops = sum(
            2 * (new * self.stacks + self.head) + new * length * self.pair_flops
            for new, length in zip(fresh, lengths, strict=True)
        )
        # KV is at least written; what a cache holds may be read once for many.
        return self._seconds(self.weight_bytes + sum(fresh) * self.kv_bytes, flops)

    def floor(self, fresh: Sequence[int], lengths: Sequence[int], output: float, concurrency: int) -> Floor:
        """Floors of a workload whose requests ask for `output` tokens, `concurrency` of them at a time."""
        count = len(lengths)
        batch = min(concurrency, count)
        firsts = [self.prefill([new], [length]) for new, length in zip(fresh, lengths, strict=True)]
        ttft = sum(firsts) / count
        step = self.step(batch, sum(lengths) / count + output / 2)
        together = self.prefill(fresh, lengths) + count / batch * (output - 1) * step
        return Floor(ttft, step, ttft + (output - 1) * step, count * output / together)

    def _seconds(self, moved: float, flops: float) -> float:
        return max(moved / self.rates.bandwidth, flops / self.rates.flops)
