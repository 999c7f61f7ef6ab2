"""The names that users type, of models and of what they set in the environment, and where they lead."""

import os
from importlib import resources
from pathlib import Path

NANO = "hrm-text-nano"
HRM_TEXT_1B = "hrm-text-1b"
HUB_ID_1B = "sapientinc/HRM-Text-1B"
PATH_VARIABLE_1B = "HRM_TEXT_1B_PATH"
KERNELS_OPTION = "HRM_TEXT_KERNELS"  # environment variable; 0 switches the fused kernels off


def resolve_model(name: str) -> str:
    """Turn `hrm-text-nano` or `hrm-text-1b` into a path or a Hub id; leave any other name as it is.

    nano is the folder bundled with this package. 1b is `$HRM_TEXT_1B_PATH` if set, else a local
    folder of that name, else the Hub's `sapientinc/HRM-Text-1B`.

    Raises:
        ValueError: `$HRM_TEXT_1B_PATH` is set to a folder without a `config.json`.
    """
    if name == NANO:
        return str(nano_path())
    if name != HRM_TEXT_1B:
        return name
    configured = os.environ.get(PATH_VARIABLE_1B)
    if configured:
        if not Path(configured, "config.json").is_file():
            raise ValueError(f"{PATH_VARIABLE_1B}={configured!r} is not a folder with a config.json")
        return configured
    if Path(HRM_TEXT_1B, "config.json").is_file():
        return str(Path(HRM_TEXT_1B).resolve())
    return HUB_ID_1B


def nano_path() -> Path:
    """Folder of the bundled demo checkpoint."""
    return Path(str(resources.files("hrm_text"))) / "checkpoints" / NANO
