"""Trains the bundled reference model: ``python -m optkit.models.reference.train --work DIR``.

A 14-million-parameter Llama on Python sources, Muon for the matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)
and AdamW for the embedding and the norms. The learning rate is flat and then falls to zero, so a run can be prolonged from its last
flat checkpoint. The text is whatever this environment has installed: another environment gives a slightly different model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optkit.data import python_sources

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
# A line break takes the indentation behind it along, and a word the character before it: fewer tokens a file.
WORDS = r"[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|[ \t]+(?=[ \t])| ?[^\s\p{L}\p{N}]+|\s+"
SHARES = {"library": 0.40, "library_tests": 0.10, "packages": 0.50}
SHORT, LONG = 256, 512
LONG_SHARE = 0.12
TOKENS_PER_STEP = 8192
DECAY_SHARE = 0.35


def main() -> None:
    """Prepare the data once, then train and keep checkpoints; calling again goes on where the last checkpoint stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and the finished model")
    parser.add_argument("--steps", type=int, default=4000, help=f"optimizer steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--minutes-between-checkpoints", type=float, default=10)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "data.json").exists():
        prepare(options.work)
    train(options.work, options.steps, options.minutes_between_checkpoints)


def prepare(work: Path) -> None:
    """Write the tokenizer and the token streams (uint16) of each source to ``work``."""
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
    sample = texts["library"] + draw.sample(texts["packages"], min(3000, len(texts["packages"])))
    tokenizer = train_tokenizer(sample)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    ).save_pretrained(work / "tokenizer")
    summary: dict[str, Any] = {}
    for name, parts in texts.items():
        draw.shuffle(parts)
        end = tokenizer.token_to_id(END_OF_TEXT)
        stream: list[np.ndarray] = []
        for start in range(0, len(parts), 256):
            for encoding in tokenizer.encode_batch(parts[start : start + 256]):
                stream.append(np.array([end, *encoding.ids], dtype=np.uint16))
        tokens = np.concatenate(stream)
        tokens.tofile(work / f"{name}.u16")
        summary[name] = {"files": len(parts), "bytes": sum(len(part.encode()) for part in parts), "tokens": int(tokens.size)}
    (work / "data.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary), flush=True)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer (Sennrich et al. 2016) learned from the texts."""
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


def reference_config() -> LlamaConfig:
    """Return the architecture of the reference model: 14.2 M parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def train(work: Path, steps: int, minutes_between_checkpoints: float) -> None:
    """Train to ``steps`` and write the finished model in bf16 to ``work / 'model'``."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(reference_config())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    streams = {name: np.fromfile(work / f"{name}.u16", dtype=np.uint16) for name in (*SHARES, "eval")}
    step = _restore(work / "checkpoint", model, optimizers)
    losses = {SHORT: _compiled_loss(model, "eager"), LONG: _compiled_loss(model, "sdpa")}
    saved_at = started = time.monotonic()
    log = (work / "log.jsonl").open("a")
    first = step
    while step < steps:
        length = LONG if step >= steps * (1 - LONG_SHARE) else SHORT
        scale = _schedule(step, steps)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        draw = np.random.default_rng(step)
        micro_batches = 2
        total = 0.0
        for _ in range(micro_batches):
            loss = losses[length](_batch(streams, draw, TOKENS_PER_STEP // micro_batches // length, length)) / micro_batches
            loss.backward()
            total += float(loss.detach())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:
            rate = (step - first) * TOKENS_PER_STEP / (time.monotonic() - started)
            print(f"step {step}/{steps}  loss {total:.3f}  {rate:.0f} tokens/s", flush=True)
            log.write(json.dumps({"step": step, "loss": total}) + "\n")
        flat = step <= steps * (1 - DECAY_SHARE)
        if step == steps or time.monotonic() - saved_at > minutes_between_checkpoints * 60:
            bits = evaluate(model, work, streams["eval"], 60_000 if step < steps else None)
            print(f"step {step}: {bits:.4f} bits per byte, held out", flush=True)
            log.write(json.dumps({"step": step, "held_out_bits_per_byte": bits}) + "\n")
            log.flush()
            _save(work / ("checkpoint" if flat else "checkpoint-falling"), step, model, optimizers)
            saved_at = time.monotonic()
    finished = LlamaForCausalLM(reference_config())
    finished.load_state_dict(model.state_dict())
    finished.to(torch.bfloat16).save_pretrained(work / "model")


@torch.no_grad()
def evaluate(model: nn.Module, work: Path, tokens: np.ndarray, limit: int | None) -> float:
    """Return bits per byte on the held-out files, in windows of 512 tokens without overlap."""
    summary = json.loads((work / "data.json").read_text())["eval"]
    rows = torch.from_numpy(tokens[: limit or tokens.size].astype(np.int64))
    rows = rows[: rows.numel() // LONG * LONG].view(-1, LONG)
    total = 0.0
    for chunk in rows.split(16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(chunk).logits
        total += float(nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum"))
    nats_per_token = total / (rows.numel() - rows.shape[0])
    return float(nats_per_token / math.log(2) * summary["tokens"] / summary["bytes"])


def _compiled_loss(model: LlamaForCausalLM, attention: str) -> Callable[[Tensor], Tensor]:
    def loss(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    compiled = torch.compile(loss, dynamic=False)

    def call(ids: Tensor) -> Tensor:
        model.config._attn_implementation = attention
        return compiled(ids)

    return call


def _batch(streams: dict[str, np.ndarray], draw: np.random.Generator, rows: int, length: int) -> Tensor:
    names = draw.choice(list(SHARES), size=rows, p=list(SHARES.values()))
    starts = [int(draw.integers(0, streams[name].size - length - 1)) for name in names]
    return torch.from_numpy(np.stack([streams[n][s : s + length + 1] for n, s in zip(names, starts, strict=True)]).astype(np.int64))


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 50)
    return warm * min(1.0, (steps - step) / (steps * DECAY_SHARE))


def _save(folder: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": torch.as_tensor(value).contiguous() for key, value in state.items()}
    folder.mkdir(exist_ok=True)
    aside = folder / "state.safetensors.aside"
    save_file(tensors, aside, metadata={"step": str(step)})
    os.replace(aside, folder / "state.safetensors")


def _restore(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


if __name__ == "__main__":
    main()
