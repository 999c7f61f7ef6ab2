"""SGLang plugin for HRM-Text; SGLang calls `register` in every process it starts."""

ARCHITECTURE = "HrmTextForCausalLM"


def register() -> None:
    """Entry point `sglang.srt.plugins`: install every hook, and check each.

    SGLang 0.5.23 logs a plugin that raises and goes on without it, with the in-tree model. So a fault
    ends the process here: `SystemExit` passes the handler that would log it.

    Raises:
        SystemExit: a hook did not take hold; the message names SGLang's version and the hook.
    """
    try:
        from hrm_sglang.install import install

        install()
    except Exception as error:
        raise SystemExit(f"hrm_sglang: SGLang is not started, HRM-Text would be served wrongly. {error}") from error
