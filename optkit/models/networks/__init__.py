"""Networks that are trained here, on the task of a recipe. A new one is one file and one line in ``NETWORKS``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from optkit.core.registry import Registry
from optkit.models.networks.contract import Network, Training

NETWORKS: Registry[Network] = Registry(
    "network",
    {
        "bilstm": "optkit.models.networks.bilstm:Bilstm",
        "encoder": "optkit.models.networks.encoder:Encoder",
        "gpt2": "optkit.models.networks.gpt2:Gpt2",
        "lstm-forecaster": "optkit.models.networks.lstm_forecaster:LstmForecaster",
        "seq2seq": "optkit.models.networks.seq2seq:Seq2Seq",
        "transformer-forecaster": "optkit.models.networks.transformer_forecaster:TransformerForecaster",
    },
)


def rebuilt(network: Mapping[str, Any]) -> nn.Module:
    """Return a fresh module of what ``described`` has said."""
    return NETWORKS[network["name"]](**network["settings"]).build(network["needs"])


def described(network: Network, needs: Mapping[str, Any]) -> dict[str, Any]:
    """Return, as plain data, how a module is made anew."""
    name = next(name for name in NETWORKS if NETWORKS[name] is type(network))
    return {"name": name, "settings": network.model_dump(mode="json", exclude={"training"}), "needs": dict(needs)}


__all__ = ["NETWORKS", "Network", "Training", "described", "rebuilt"]
