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
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optkit.models.reference.corpus import VOCABULARY, Stream, prepare

SHARES = {"library": 0.40, "library_tests": 0.10, "packages": 0.50}
SHORT, LONG = 256, 512  # tokens of a training sequence, at first and in the end
LONG_SHARE = 0.12
TOKENS_PER_STEP = 8192
MICRO_BATCHES = 2
DECAY_SHARE = 0.35
WARM_UP_STEPS = 50


def main() -> None:
    """Prepare the data once, then train and keep checkpoints; calling again goes on where the last flat checkpoint stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and the finished model")
    parser.add_argument("--steps", type=int, default=2400, help=f"optimizer steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--minutes-between-checkpoints", type=float, default=10)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "data.json").exists():
        prepare(options.work)
    train(options.work, options.steps, options.minutes_between_checkpoints)


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
    """Train to ``steps`` and write the finished model in bf16, with its tokenizer, to ``work / 'model'``."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaForCausalLM(reference_config()).to(device)
    optimizers = _optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    streams = {name: np.fromfile(work / f"{name}.u16", dtype=np.uint16) for name in (*SHARES, "eval")}
    losses = {SHORT: _compiled_loss(model, "eager"), LONG: _compiled_loss(model, "sdpa")}
    step = _restore(work / "checkpoint", model, optimizers)
    saved_at = time.monotonic()
    while step < steps:
        began = time.monotonic()
        length = LONG if step >= steps * (1 - LONG_SHARE) else SHORT
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * _schedule(step, steps)
        draw = np.random.default_rng(step)
        total = 0.0
        for _ in range(MICRO_BATCHES):
            ids = _batch(streams, draw, TOKENS_PER_STEP // MICRO_BATCHES // length, length).to(device)
            loss = losses[length](ids) / MICRO_BATCHES
            loss.backward()
            total += float(loss.detach())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        print(f"step {step}/{steps}  loss {total:.3f}  {TOKENS_PER_STEP / (time.monotonic() - began):.0f} tokens/s", flush=True)
        if step == steps or time.monotonic() - saved_at > minutes_between_checkpoints * 60:
            bits = evaluate(model, work, streams["eval"], None if step == steps else 60_000)
            print(f"step {step}/{steps}  {bits:.4f} bits per byte, held out", flush=True)
            flat = step <= steps * (1 - DECAY_SHARE)
            _save(work / ("checkpoint" if flat else "checkpoint-falling"), step, model, optimizers)
            saved_at = time.monotonic()
    _finish(work, model)


@torch.no_grad()
def evaluate(model: nn.Module, work: Path, tokens: Stream, limit: int | None) -> float:
    """Return bits per byte on the held-out files, in windows of 512 tokens without overlap."""
    summary = json.loads((work / "data.json").read_text())["eval"]
    rows = torch.from_numpy(tokens[: limit or tokens.size].astype(np.int64)).to(next(model.parameters()).device)
    rows = rows[: rows.numel() // LONG * LONG].view(-1, LONG)
    total = 0.0
    for chunk in rows.split(16):
        with torch.autocast(rows.device.type, dtype=torch.bfloat16):
            logits = model(chunk).logits
        total += float(nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum"))
    nats_per_token = total / (rows.numel() - rows.shape[0])
    return float(nats_per_token / math.log(2) * summary["tokens"] / summary["bytes"])


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _compiled_loss(model: LlamaForCausalLM, attention: str) -> Callable[[Tensor], Tensor]:
    def loss(ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    compiled = torch.compile(loss, dynamic=False)

    def call(ids: Tensor) -> Tensor:
        # On a CPU, plain attention trains faster than the fused one at 256 tokens, and slower at 512.
        model.config._attn_implementation = attention
        return compiled(ids)

    return call


def _batch(streams: dict[str, Stream], draw: np.random.Generator, rows: int, length: int) -> Tensor:
    names = draw.choice(list(SHARES), size=rows, p=list(SHARES.values()))
    starts = [int(draw.integers(0, streams[name].size - length - 1)) for name in names]
    return torch.from_numpy(np.stack([streams[n][s : s + length + 1] for n, s in zip(names, starts, strict=True)]).astype(np.int64))


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * min(1.0, (steps - step) / (steps * DECAY_SHARE))


def _finish(work: Path, model: LlamaForCausalLM) -> None:
    finished = LlamaForCausalLM(reference_config())
    finished.load_state_dict(model.state_dict())
    finished.to(torch.bfloat16).save_pretrained(work / "model")
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").save_pretrained(work / "model")


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
