"""The recurrence plan: which stack runs at which step, and which KV slots it owns.

HRM-Text (arXiv 2605.20613, `transformers.models.hrm_text.HrmTextModel.forward`) runs two stacks of
`layers_per_stack` blocks over the same tokens:

    for h in range(H_cycles):
        for l in range(L_cycles):  z_L = L(z_L + z_H)      step h * (L_cycles + 1) + l
        z_H = H(z_H + z_L)                                 step h * (L_cycles + 1) + L_cycles

A stack's weights are shared by its calls; its KV cache is not: every (step, layer) has a slot.
"""

from dataclasses import dataclass
from typing import Literal

Stack = Literal["L", "H"]


@dataclass(frozen=True)
class RecurrencePlan:
    """The steps of one forward pass.

    Attributes:
        H_cycles: slow cycles, at least 1.
        L_cycles: fast cycles inside each slow one, at least 1.
        layers_per_stack: transformer blocks in each stack.
    """

    H_cycles: int
    L_cycles: int
    layers_per_stack: int

    @property
    def steps(self) -> tuple[Stack, ...]:
        """The stack that each step calls, in order."""
        fast: tuple[Stack, ...] = ("L",)
        slow: tuple[Stack, ...] = ("H",)
        return (fast * self.L_cycles + slow) * self.H_cycles

    @property
    def num_slots(self) -> int:
        """KV slots of one token: one for each (step, layer)."""
        return len(self.steps) * self.layers_per_stack

    def steps_of(self, stack: Stack) -> tuple[int, ...]:
        """The steps at which `stack` runs."""
        return tuple(step for step, kind in enumerate(self.steps) if kind == stack)

    def slot(self, step: int, layer: int) -> int:
        """KV slot of block `layer` at `step`; transformers' `layer_idx + cycle_offset`."""
        return step * self.layers_per_stack + layer

    def stage(self, rank: int, world_size: int) -> range:
        """Steps that pipeline stage `rank` of `world_size` runs.

        Steps are dealt out as evenly as they go; earlier stages take the remainder, for the last
        one also computes the logits.

        Raises:
            ValueError: more stages than steps.
        """
        total = len(self.steps)
        if world_size > total:
            raise ValueError(
                f"pipeline_parallel_size={world_size} exceeds the {total} recurrence steps of this model "
                f"(H_cycles={self.H_cycles}, L_cycles={self.L_cycles}); the limit is {total}"
            )
        base, extra = divmod(total, world_size)
        start = rank * base + min(rank, extra)
        return range(start, start + base + (rank < extra))

    def kv_bytes_per_token(self, num_heads: int, head_dim: int, bytes_per_element: int) -> int:
        """Bytes of keys and values that one token keeps over all slots."""
        return 2 * self.num_slots * num_heads * head_dim * bytes_per_element
