"""LoRA adapters over HTTP, named at the start and brought while the server runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hrm_text.envelope import ChatEncoder
from hrm_text.names import nano_path
from hrm_text.oracle import load_reference, token_logprobs
from hrm_text.spans import envelope_spans
from tests.adapters import make_adapter, merged
from tests.vllm.mixes import TOLERANCE
from tests.vllm.test_server import Server, serving

pytestmark = pytest.mark.cpu
RUNTIME = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def test_adapters_are_served_or_refused(tmp_path: Path) -> None:
    reference = load_reference(nano_path())
    good, wrong = (make_adapter(tmp_path / name, reference, 8) for name in ("good", "wrong"))
    tensors = load_file(wrong / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.lora_B.weight"))
    save_file(tensors | {name: torch.zeros(7, 8)}, wrong / "adapter_model.safetensors")
    adapted = merged(nano_path(), good)
    models = {"first": adapted, "second": adapted, "hrm-text-nano": reference}
    with serving(tmp_path / "log", "--enable-lora", "--lora-modules", f"first={good}", **RUNTIME) as server:
        for path, message in ((wrong, "has shape (7, 8)"), (tmp_path / "nowhere", "no adapter can be read")):
            status, answer = load(server, "third", path)
            assert status == 400
            assert "LoRA adapter 'third'" in answer["error"]["message"]
            assert message in answer["error"]["message"]
        assert load(server, "second", good)[0] == 200
        for model, expected in models.items():
            assert deviation(server, model, expected) <= TOLERANCE


def test_a_start_with_a_wrong_adapter_stops(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="LoRA adapter 'first': no adapter can be read"),
        serving(tmp_path / "log", "--enable-lora", "--lora-modules", f"first={tmp_path}"),
    ):
        pass


def load(server: Server, name: str, path: Path) -> tuple[int, Any]:
    return server.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path))


def deviation(server: Server, model: str, expected: Any) -> float:
    """Largest |log-prob - oracle's| of the tokens that `model` answers a chat with."""
    from transformers import AutoTokenizer

    encoder = ChatEncoder.of(AutoTokenizer.from_pretrained(nano_path()))
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    prompt = encoder.encode_chat(messages, "direct")
    status, answer = server.post(
        "/v1/completions", model=model, prompt=prompt, max_tokens=6, logprobs=0, ignore_eos=True, return_token_ids=True
    )
    assert status == 200
    (choice,) = answer["choices"]
    ids = [*prompt, *choice["token_ids"]]
    oracle = token_logprobs(expected, ids, envelope_spans(prompt, encoder.envelope))[len(prompt) - 1 :]
    got = choice["logprobs"]["token_logprobs"]
    return max(abs(float(a) - b) for a, b in zip(oracle, got, strict=True))
