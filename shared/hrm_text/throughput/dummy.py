"""A folder to serve random weights from: a configuration, and a tokenizer where there is none."""

import json
from pathlib import Path

from hrm_text.names import nano_path, resolve_model


def dummy_model(model: str, out: Path) -> str:
    """A name or folder that an engine can load with random weights.

    A folder that has only a `config.json` gets nano's tokenizer, with its vocabulary filled up to the model's, so
    that every token the model may emit has a text.

    Raises:
        OSError: there is no configuration, or `out` cannot be written.
    """
    source = Path(resolve_model(model))
    if not source.is_dir() or (source / "tokenizer.json").exists():
        return str(source) if source.is_dir() else resolve_model(model)
    folder = out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    settings = json.loads((nano_path() / "tokenizer_config.json").read_text())
    settings["model_max_length"] = config["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((nano_path() / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    known = max(max(vocabulary.values()), *(token["id"] for token in tokenizer["added_tokens"])) + 1
    vocabulary |= {f"x{token}": token for token in range(known, config["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder.resolve())
