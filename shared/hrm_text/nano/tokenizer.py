"""The demo checkpoint's tokenizer: byte-level BPE with HRM-Text's special tokens at the 1B checkpoint's ids.

Digits are single tokens, so that a number's spelling does not depend on what the corpus happened to hold.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hrm_text.nano.problems import training_stream

SPECIAL_TOKENS = (
    *(f"<|reserved_{i}|>" for i in range(5)),
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
)
PAD, BOS, SPAN_END, EOS = 5, 6, 7, 11
CONDITION_IDS = {"direct": (8,), "synth,cot": (13, 9)}
VOCAB_SIZE = 1536
CORPUS_ITEMS = 30_000
CORPUS_SEED = 0


def train_tokenizer(items: int = CORPUS_ITEMS, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learns merges on the first `items` training problems."""
    tokenizer = Tokenizer(models.BPE())
    # A word with its leading space, single digits, runs of punctuation, runs of white space.
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    problems = islice(training_stream(CORPUS_SEED), items)
    corpus = (text for p in problems for turn in p.turns for text in (turn.prompt, turn.response))
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int = 1024) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` for `AutoTokenizer`."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[PAD],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="left",
    ).save_pretrained(folder)
    # transformers 5 writes its own class name, which other readers of the folder don't know.
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(), folder)


if __name__ == "__main__":
    main()
