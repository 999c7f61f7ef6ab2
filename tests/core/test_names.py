"""Where the model names that users type lead."""

from pathlib import Path

import pytest

from hrm_text.names import HUB_ID_1B, PATH_VARIABLE_1B, nano_path, resolve_model


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no path of the 1B in the environment."""
    monkeypatch.delenv(PATH_VARIABLE_1B, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def test_nano_is_the_bundled_checkpoint() -> None:
    folder = Path(resolve_model("hrm-text-nano"))

    assert folder == nano_path()
    assert folder.is_absolute()
    assert all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def test_1b_is_the_environments_path_before_a_local_folder(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(elsewhere / "hrm-text-1b")
    configured = model_folder(elsewhere / "weights")
    monkeypatch.setenv(PATH_VARIABLE_1B, str(configured))

    assert resolve_model("hrm-text-1b") == str(configured)


@pytest.mark.parametrize("variable", [None, ""])
def test_1b_is_a_local_folder_before_the_hub(
    variable: str | None, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv(PATH_VARIABLE_1B, variable)
    local = model_folder(elsewhere / "hrm-text-1b")

    assert resolve_model("hrm-text-1b") == str(local.resolve())


def test_1b_is_the_hubs_when_nothing_is_local(elsewhere: Path) -> None:
    (elsewhere / "hrm-text-1b").mkdir()  # Without a config.json it is no checkpoint.

    assert resolve_model("hrm-text-1b") == HUB_ID_1B == "sapientinc/HRM-Text-1B"


def test_a_bad_path_in_the_environment_is_refused_by_name(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(elsewhere / "hrm-text-1b")
    monkeypatch.setenv(PATH_VARIABLE_1B, str(elsewhere / "nowhere"))

    with pytest.raises(ValueError, match=rf"^{PATH_VARIABLE_1B}='.*nowhere' is not a folder with a config\.json$"):
        resolve_model("hrm-text-1b")


@pytest.mark.parametrize(
    "name", ["sapientinc/HRM-Text-1B", "HRM-TEXT-NANO", "HRM-Text-1B", "./hrm-text-1b", "org/hrm-text-nano", ""]
)
def test_other_names_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE_1B, "nowhere")

    assert resolve_model(name) == name
