"""Differences between the supported SGLang versions, one function each."""

# 0.5.23 is the one tested; 0.5.22 was checked against its source only. Before it, the radix cache and the memory
# budget of a prefill have other methods.
SUPPORTED = ((0, 5, 22), (0, 5, 23))


def check_version() -> None:
    """Refuse an SGLang that the hooks were not written for.

    Raises:
        hrm_sglang.hooks.HookError: any release but 0.5.22 and 0.5.23.
    """
    from packaging.version import Version
    from sglang.version import __version__

    from hrm_sglang.hooks import HookError

    if Version(__version__).release[:3] not in SUPPORTED:
        raise HookError("version", "this plugin was written for 0.5.22 and 0.5.23")
