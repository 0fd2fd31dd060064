"""The reference model's data: a tokenizer and streams of tokens, made from the Python sources that are installed here."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from optkit.data import python_sources

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
# A line break takes the indentation behind it along, and a word the character before it: fewer tokens a file.
WORDS = r"[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|[ \t]+(?=[ \t])| ?[^\s\p{L}\p{N}]+|\s+"
_SAMPLED_PACKAGES = 3000

Stream = NDArray[np.uint16]


def prepare(work: Path) -> None:
    """Write the tokenizer, the streams of tokens (uint16) and ``data.json`` to ``work``."""
    held_out = python_sources.standard_library("eval")
    library = list(python_sources.without_copies(python_sources.standard_library("train"), held_out))
    packages = list(python_sources.without_copies(python_sources.installed_packages(), held_out))
    texts = {
        "library": [text for path, text in library if not python_sources.is_test(path)],
        "library_tests": [text for path, text in library if python_sources.is_test(path)],
        "packages": [text for _, text in packages],
        "eval": [python_sources.read_source(path) for path in held_out],
    }
    draw = random.Random(0)
    sample = texts["library"] + draw.sample(texts["packages"], min(_SAMPLED_PACKAGES, len(texts["packages"])))
    tokenizer = train_tokenizer(sample)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    ).save_pretrained(work / "tokenizer")
    summary: dict[str, Any] = {}
    for name, parts in texts.items():
        draw.shuffle(parts)
        tokens = _stream(tokenizer, parts)
        tokens.tofile(work / f"{name}.u16")
        summary[name] = {"files": len(parts), "bytes": sum(len(part.encode()) for part in parts), "tokens": int(tokens.size)}
    (work / "data.json").write_text(json.dumps(summary, indent=1))


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer (Sennrich et al. 2016, arXiv 1508.07909) learned from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _stream(tokenizer: Tokenizer, texts: Sequence[str], together: int = 256) -> Stream:
    """Return the tokens of all texts in a row, each begun by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = [
        np.array([end, *encoding.ids], dtype=np.uint16)
        for start in range(0, len(texts), together)
        for encoding in tokenizer.encode_batch(texts[start : start + together])
    ]
    return np.concatenate(parts)
