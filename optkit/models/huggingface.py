"""Opens models in Hugging Face format: safetensors only, remote code only where the command line allows it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optkit.core import files
from optkit.core.errors import MissingError, ModelError
from optkit.core.subject import Subject
from optkit.models.architectures import build, class_of, kind_of
from optkit.models.interchange.opening import method_of, open_quantized

# Keys by which a configuration can name code to run; refused wherever they stand, at any depth.
_CODE_KEYS = {"auto_map", "custom_pipelines"}
_NEVER_KEYS = {"trust_remote_code", "_attn_implementation_internal", "_experts_implementation_internal"}


def open_pretrained(place: Path | str, source: str, trust_remote_code: bool = False) -> Subject:
    """Open a model with its tokenizer in the dtype it is stored in; one that another tool quantized with its numbers as they are.

    Raises:
        ModelError: something is missing or damaged, or transformers has no class for it.
        MissingError: a Hub name was given and the Hub cannot be reached.
    """
    config = read_config(place, trust_remote_code)
    if isinstance(place, Path) and not list(place.glob("*.safetensors")):
        raise ModelError(_no_weights(place))
    if isinstance(place, Path):
        _refuse_foreign_shards(place)
    if method_of(config) is not None:
        packed, step = open_quantized(place, config)
        refuse_not_finite(packed, str(place))
        return Subject(module=packed.eval(), source=source, kind=kind_of(packed), tokenizer=_tokenizer(place), history=(step,))
    opener, allowed = _opener(config, place, trust_remote_code)
    try:
        module, info = opener.from_pretrained(
            place,
            config=config,
            dtype="auto",
            use_safetensors=True,
            **allowed,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            low_cpu_mem_usage=True,
            local_files_only=_only_local(place),
        )
    except Exception as error:  # every library below raises its own kinds for damaged input
        raise ModelError(f"model {str(place)!r} cannot be opened: {_first_line(error)}") from error
    _refuse_holes(place, module, info)
    _refuse_lost_head(place, module, info)
    refuse_not_finite(module, str(place))
    return Subject(module=module.eval(), source=source, kind=kind_of(module), tokenizer=_tokenizer(place))


def outline(place: Path | str, source: str, trust_remote_code: bool = False) -> Subject:
    """Open a model's shapes on the meta device."""
    config = read_config(place, trust_remote_code)
    if method_of(config) is not None:
        packed, step = open_quantized(place, config, only_shapes=True)
        return Subject(module=packed.eval(), source=source, kind=kind_of(packed), tokenizer=None, history=(step,))
    opener, allowed = _opener(config, place, trust_remote_code)
    try:
        with torch.device("meta"):
            module = opener.from_config(config, **allowed) if allowed else build(opener, config)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"model {str(place)!r} is none that transformers can build: {_first_line(error)}") from error
    return Subject(module=module.eval(), source=source, kind=kind_of(module), tokenizer=None)


def _opener(config: Any, place: Path | str, trust_remote_code: bool) -> tuple[Any, dict[str, bool]]:
    """Return the class that opens a model, and what it must be told of remote code."""
    from transformers import AutoModelForCausalLM

    own_code = trust_remote_code and getattr(config, "auto_map", None)
    opener = AutoModelForCausalLM if own_code else class_of(config, str(place))
    return opener, {"trust_remote_code": trust_remote_code} if opener is AutoModelForCausalLM else {}


def refuse_not_finite(module: nn.Module, place: str) -> None:
    """Refuse weights with NaN or infinity; the tensors are named.

    Raises:
        ModelError: there are some.
    """
    # A sum is finite only where all its terms are, and needs no second copy of the tensor.
    bad = [
        name
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and not torch.isfinite(parameter.sum(dtype=torch.float64))
    ]
    if bad:
        raise ModelError(f"model {place!r} has NaN or infinite weights in {len(bad)} tensors, the first is {bad[0]}")


def read_config(place: Path | str, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a model.

    Raises:
        ModelError: it is missing or damaged, or names code to run.
        MissingError: a Hub name was given and the Hub cannot be reached.
    """
    from transformers import AutoConfig

    if isinstance(place, Path):
        if not (place / "config.json").is_file():
            raise ModelError(f"model folder {str(place)!r} has no config.json")
        _refuse_code(files.read_json(place / "config.json"), str(place), trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, local_files_only=_only_local(place))
    except Exception as error:  # every library below raises its own kinds for damaged input
        if not isinstance(place, Path) and _is_unreachable(error):
            raise MissingError(
                f"model {place!r} is no folder here, and the Hub cannot be reached or has no such model; "
                f"download it elsewhere and give the folder"
            ) from error
        raise ModelError(f"the configuration of model {str(place)!r} cannot be read: {_first_line(error)}") from error
    _refuse_code(config.to_dict(), str(place), trust_remote_code)
    return config


def _refuse_code(value: Any, place: str, trusted: bool, path: str = "config.json") -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if item not in (None, False) and (key in _NEVER_KEYS or (key in _CODE_KEYS and not trusted)):
                way = "" if key in _NEVER_KEYS else "; --trust-remote-code allows it, if you trust its author"
                raise ModelError(f"model {place!r}: {path} contains {key!r}, which names code to run{way}")
            _refuse_code(item, place, trusted, f"{path}:{key}")
    elif isinstance(value, list):
        for item in value:
            _refuse_code(item, place, trusted, path)


def _refuse_holes(place: Path | str, module: nn.Module, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys", ()))
    shapes = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get("mismatched_keys", ()))
    if missing:
        raise ModelError(
            f"the weights of model {str(place)!r} lack {len(missing)} tensors that {type(module).__name__} needs, such as {missing[0]}"
        )
    if shapes:
        raise ModelError(f"model {str(place)!r} has {len(shapes)} tensors of another shape than its config.json says, such as {shapes[0]}")


def _refuse_lost_head(place: Path | str, module: nn.Module, info: dict[str, Any]) -> None:
    lost = sorted(info.get("unexpected_keys", ()))
    if lost and not module.config.architectures:  # type: ignore[union-attr]
        raise ModelError(
            f"the config.json of model {str(place)!r} names no architecture, and {type(module).__name__} has no place for {len(lost)} "
            f'of its tensors, such as {lost[0]}; add the class that was trained: "architectures": [...]'
        )


def _tokenizer(place: Path | str) -> Any:
    from transformers import AutoTokenizer

    if isinstance(place, Path) and not any(
        (place / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=_only_local(place))
    except Exception as error:  # every library below raises its own kinds for damaged input
        raise ModelError(f"the tokenizer of model {str(place)!r} cannot be opened: {_first_line(error)}") from error


def _refuse_foreign_shards(place: Path) -> None:
    index = place / "model.safetensors.index.json"
    if not index.is_file():
        return
    listed = files.read_json(index)
    shards = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(shards, dict):
        raise ModelError(f"{index} has no 'weight_map'")
    foreign = sorted({str(shard) for shard in shards.values() if not isinstance(shard, str) or Path(shard).name != shard})
    if foreign:
        raise ModelError(f"{index} names weights outside the model folder: {foreign[0]!r}")


def _no_weights(place: Path) -> str:
    other = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5") for path in place.glob(pattern))
    found = f"; {other[0]} is not opened, because its format can run code: convert it to safetensors" if other else ""
    return f"model folder {str(place)!r} has no *.safetensors{found}"


def _is_unreachable(error: Exception) -> bool:
    return isinstance(error, OSError) or "connect" in str(error).lower()


def _only_local(place: Path | str) -> bool:
    return isinstance(place, Path) or os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"} or not _hub_answers(place)


@cache
def _hub_answers(name: str) -> bool:
    """Ask once, because the Hub's own client tries for half a minute before it gives up."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=10)
    except HfHubHTTPError:
        return True  # it refuses, and the one who asks for the files will say what
    except Exception:  # a network that is not there has another kind of error in each version of the client
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
