"""Which class of transformers a configuration means: public classes by their exact names, and never code that comes with a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from optkit.core.errors import ModelError
from optkit.core.subject import Kind


def named_class(name: str, config: Any) -> Any:
    """Return the public model class of transformers that has this name and is built from such a configuration, or None."""
    if config is None:
        return None
    import transformers

    found: Any = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return None
    wanted = getattr(found, "config_class", None)
    return found if wanted is not None and isinstance(config, wanted) else None


def is_public(module: nn.Module) -> bool:
    """Say whether the class of the module can be found again by its name and the module's configuration."""
    config = getattr(module, "config", None)
    return named_class(type(module).__name__, config) is type(module)


def class_of(config: Any, place: str) -> Any:
    """Return what opens a configuration: the class that its ``architectures`` name; without one, the usual class of its type.

    Raises:
        ModelError: the class named is no public one of transformers, or belongs to another type of model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    named = named_class(names[0], config) if names else None
    if named is not None:
        return named
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not _looks_both_ways(config):
        return AutoModelForCausalLM  # older models spell their class otherwise
    if names:
        raise ModelError(
            f"model {place!r} cannot be opened: its config.json names the architecture {names[0]!r}, "
            f"which transformers has no public class of for {config.model_type!r}"
        )
    if type(config) in MODEL_MAPPING:
        return MODEL_MAPPING[type(config)]
    raise ModelError(f"model {place!r} cannot be opened: its config.json names no architecture, and {config.model_type!r} has no usual one")


def build(kind: Any, config: Any) -> nn.Module:
    """Return a model of a class that ``named_class`` found, with weights as its constructor leaves them."""
    module: nn.Module = kind._from_config(config)  # as AutoModel calls it: the dtype of the configuration is heeded
    return module


def kind_of(module: nn.Module) -> Kind:
    """Return which engine a module needs. What writes for something other than text, such as sound, runs forward only."""
    generates = getattr(module, "can_generate", None)
    config = getattr(module, "config", None)
    if not (callable(generates) and generates()) or getattr(module, "main_input_name", "input_ids") != "input_ids":
        return "module"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq-lm"
    return "module" if _looks_both_ways(config) else "causal-lm"


def _looks_both_ways(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    # transformers opens encoders as causal models too, with weights that were trained to look both ways
    return bool(getattr(config, "is_encoder_decoder", False)) or (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    )
