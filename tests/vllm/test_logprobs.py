"""What log-probs' tokens are called, decoded once for all requests."""

from collections import Counter
from typing import Any

import pytest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.logprobs import Logprob
from vllm.tokenizers import get_tokenizer
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

from hrm_text.names import nano_path
from hrm_vllm.logprobs import decoding_once, with_one_decoding


class Counting:
    """A tokenizer that knows what it has decoded."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.decoded: Counter[tuple[int, ...]] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, ids: Any) -> str:
        self.decoded[(ids,) if isinstance(ids, int) else tuple(ids)] += 1
        return self.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return get_tokenizer(str(nano_path()))


def test_every_token_has_its_own_text(tokenizer: Any) -> None:
    ids = list(range(len(tokenizer)))
    once = decoding_once(tokenizer)
    assert decoding_once(once) is once
    assert convert_ids_list_to_tokens(once, ids) == convert_ids_list_to_tokens(tokenizer, ids)
    assert [once.decode(token) for token in ids] == [tokenizer.decode(token) for token in ids]
    text = "Tokens that belong together: é, 火, 🔥"
    assert once.decode(once.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert once.decode(ids[:1], skip_special_tokens=True) == tokenizer.decode(ids[:1], skip_special_tokens=True)


def test_holes_of_a_scored_prompt_are_decoded_once(tokenizer: Any) -> None:
    """The same answer as without, in streams too, whose callers name the tokenizer as well."""
    ids = [30 + index % 7 for index in range(200)]
    logprobs = [None] * 190 + [{token: Logprob(-1.0, 1, "text")} for token in ids[190:]]
    serving = OpenAIServingCompletion.__new__(OpenAIServingCompletion)
    serving.return_tokens_as_token_ids = False
    original, counting = OpenAIServingCompletion._create_completion_logprobs, Counting(tokenizer)
    original = getattr(original, "__wrapped__", original)
    arguments: dict[str, Any] = {"token_ids": ids, "top_logprobs": logprobs, "num_output_top_logprobs": 1}
    for _ in range(2):
        answer = with_one_decoding(original)(serving, tokenizer=counting, **arguments)
        assert answer == original(serving, tokenizer=tokenizer, **arguments)
    assert set(counting.decoded.values()) == {1} and len(counting.decoded) == 7
