"""Tiny models, a tokenizer made in memory, and a saved folder. Nothing here touches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optkit.core.subject import Calibration, Subject

VOCABULARY = 96
WORDS = ["def", "return", "if", "else", "for", "in", "class", "self", "x", "y", "z", "(", ")", ":", "=", "+", "-", "*", "/", ",", "0", "1"]
Llama = Callable[..., nn.Module]
Subjects = Callable[..., Subject]


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> Iterator[None]:
    """Compute on one thread, because on matrices this small a second one only waits; and draw the same numbers in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute with packed layers in plain PyTorch."""
    from optkit.kernels import native

    with monkeypatch.context() as patch:
        patch.setenv("OPTKIT_KERNELS", "torch")
        native.forget()
        yield
    native.forget()


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    """Keep remarks about special tokens beyond a tiny vocabulary out of the output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_llama() -> Llama:
    """Return a function that builds a random Llama of 64 channels; keywords change its configuration."""

    def build(seed: int = 0, **changes: Any) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "initializer_range": 0.2,
        }
        torch.manual_seed(seed)
        module: nn.Module = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
        return module

    return build


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Return a tokenizer of some twenty Python words, the rest unknown; token 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: number for number, word in enumerate(["<|endoftext|>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def subject(tiny_llama: Llama, tokenizer: Any) -> Subjects:
    """Return a function that makes a subject of a random Llama with the tokenizer."""
    return lambda seed=0, **changes: Subject(module=tiny_llama(seed, **changes), source="tiny", tokenizer=tokenizer)


@pytest.fixture
def model_folder(tiny_llama: Llama, tokenizer: Any, tmp_path: Path) -> Path:
    """Return a folder with a random Llama and a tokenizer, as transformers saves them."""
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """Return (2, 12) token ids."""
    return torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def logits(ids: Tensor) -> Callable[[nn.Module], Tensor]:
    """Return a function that gives a model's logits for the token ids."""

    def of(module: nn.Module) -> Tensor:
        with torch.inference_mode():
            found: Tensor = module(input_ids=ids, use_cache=False).logits
        return found

    return of


@pytest.fixture(scope="session")
def calibration(ids: Tensor) -> Calibration:
    """Return two batches of token ids."""
    return Calibration(({"input_ids": ids}, {"input_ids": ids.flip(1)}))


@pytest.fixture(scope="session")
def mlp() -> Callable[[], nn.Module]:
    """Return a function that builds a plain network of three linear layers."""
    return lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 32, bias=False))


@pytest.fixture(scope="session")
def greedy() -> Callable[[Subject, Tensor, int], tuple[Tensor, Tensor]]:
    """Return a function that continues prompts twice: by the engine with its cache, and by full forwards without one."""

    def both(subject: Subject, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
        from optkit.engines import EagerEngine

        engine = EagerEngine(subject.module)
        fast = [engine.prefill(prompt).argmax(-1)]
        while len(fast) < count:
            fast.append(engine.step(fast[-1]).argmax(-1))
        whole = prompt
        with torch.inference_mode():
            for _ in range(count):
                following = subject.module(input_ids=whole, use_cache=False).logits[:, -1].argmax(-1)
                whole = torch.cat([whole, following[:, None]], 1)
        return torch.stack(fast, 1), whole[:, prompt.shape[1] :]

    return both
