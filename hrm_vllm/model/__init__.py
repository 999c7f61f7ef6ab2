"""The vLLM model class, in a package of its own: vLLM keys its model-info cache by a package's files."""

from hrm_vllm.model.causal_lm import HrmTextForCausalLM

__all__ = ["HrmTextForCausalLM"]
