"""The two stacks, each compiled once: vLLM would unroll the recurrence and compile all 128 layer calls of the 1B.

A compiled stack knows its attention layers by the names of the first step that runs it. At another step the same
names stand for other KV slots: the table in which vLLM's attention op looks names up says so for that long.

PIECEWISE graphs are captured when a size first runs, and replayed at every step of the stack from then on. So the
stack's input has to lie where it lay then, and its output is the graph's, which the next replay writes over.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from hrm_text.model import HrmTextBody, StackModule


class Pass(nn.Module):
    """A stack's pass at its first step, which vLLM compiles.

    Args:
        stack: with the weights; not registered here, for they are the body's.
        step: one that runs it.
    """

    def __init__(self, *, vllm_config: VllmConfig, stack: StackModule, step: int) -> None:
        super().__init__()
        self.stack = (stack,)
        self.step = step


# vLLM keeps what it compiled under the name of the method, so each stack has its own.
@support_torch_compile
class LPass(Pass):
    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.stack[0](positions, x, self.step, None)


@support_torch_compile
class HPass(Pass):
    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.stack[0](positions, x, self.step, None)


class Passes:
    """Runs the stacks of `body` at the steps of its stage, compiled where vLLM compiles.

    Args:
        body: of the model.
        config: of the engine.

    Attributes:
        compiled: what vLLM compiles, by the stack's letter. The model must have these among its modules: PIECEWISE
            graphs are captured only of one that has compiled modules.
    """

    def __init__(self, body: HrmTextBody, config: VllmConfig) -> None:
        self._body = body
        self._first: dict[str, int] = {}
        self.compiled = nn.ModuleDict()
        for kind, stack, make in (("L", body.L_module, LPass), ("H", body.H_module, HPass)):
            steps = [step for step in body.stage if body.steps[step] == kind]
            if steps:
                self._first[kind] = steps[0]
                with set_model_tag(f"hrm_text_{kind}"):
                    self.compiled[kind] = make(vllm_config=config, stack=stack, step=steps[0])
        tokens = config.scheduler_config.max_num_batched_tokens
        self._input = torch.empty(tokens, body.shape.hidden_size)

    def __call__(self, positions: torch.Tensor, z: torch.Tensor, other: torch.Tensor, step: int) -> torch.Tensor:
        """The state after `step`, of the state `z` that it updates and the other one, each (tokens, hidden)."""
        kind = self._body.steps[step]
        run, first = self.compiled[kind], self._first[kind]
        if run.do_not_compile:
            stack = run.stack[0]
            return stack(positions, z + other, step, None)
        x = torch.add(z, other, out=self._input[: len(z)])
        with _slots_of(run.stack[0], first, step):
            return run(positions, x).clone()


@contextmanager
def _slots_of(stack: StackModule, first: int, step: int) -> Iterator[None]:
    """While inside, the names of the stack's attention layers at step `first` stand for those at `step`."""
    layers = get_forward_context().no_compile_layers
    choices = [block.self_attn.attn for block in stack.layers]
    names = [choice[str(first)].attn.layer_name for choice in choices]
    layers.update(zip(names, (choice[str(step)].attn for choice in choices), strict=True))
    try:
        yield
    finally:
        layers.update(zip(names, (choice[str(first)].attn for choice in choices), strict=True))
