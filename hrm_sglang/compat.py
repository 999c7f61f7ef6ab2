"""Differences between the supported SGLang versions, one function each."""

SUPPORTED = ((0, 5, 20), (0, 5, 23))  # first and last; 0.5.23 is the one tested


def check_version() -> None:
    """Refuse an SGLang that the hooks were not written for.

    Raises:
        hrm_sglang.hooks.HookError: any release outside 0.5.20 to 0.5.23.
    """
    from packaging.version import Version
    from sglang.version import __version__

    from hrm_sglang.hooks import HookError

    if not SUPPORTED[0] <= Version(__version__).release[:3] <= SUPPORTED[1]:
        raise HookError("version", "this plugin was written for 0.5.20 to 0.5.23")
