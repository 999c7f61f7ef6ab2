"""vLLM plugin for HRM-Text; vLLM calls `register` in every process it starts."""

ARCHITECTURE = "HrmTextForCausalLM"


def register() -> None:
    """Entry point `vllm.general_plugins`: install every hook, and check each.

    Raises:
        hrm_vllm.hooks.HookError: a hook found another vLLM than it was written for; start-up stops.
    """
    from hrm_vllm.install import install

    install()
