"""What vLLM wants to know of the model before it loads it.

vLLM asks in a process of its own, because some models initialise CUDA when they are imported, and a process with CUDA
cannot be forked. This one does not, and that process costs a cold machine as much as a second import of vLLM.
"""

from vllm.model_executor.models.registry import _LazyRegisteredModel, _ModelInfo


class InspectedHere(_LazyRegisteredModel):
    """A model by the names of its module and class, imported in this process when vLLM asks what it can do."""

    def inspect_model_cls(self) -> _ModelInfo:
        return _ModelInfo.from_model_cls(self.load_model_cls())
