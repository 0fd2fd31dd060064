"""optkit: compose compression transforms for a model in a short recipe, and measure honestly what they buy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optkit.core.errors import OptkitError

if TYPE_CHECKING:
    from optkit.harness.run import run as run
    from optkit.models.artefact import load as load
    from optkit.models.artefact import save as save
    from optkit.report.compare import load_reports as load_reports
    from optkit.report.record import Report as Report

__version__ = "0.1.0"
__all__ = ["OptkitError", "Report", "__version__", "load", "load_reports", "run", "save"]

_HOMES = {
    "run": "optkit.harness.run",
    "load": "optkit.models.artefact",
    "save": "optkit.models.artefact",
    "load_reports": "optkit.report.compare",
    "Report": "optkit.report.record",
}


def __getattr__(name: str) -> Any:
    # Opened on first use: a command line that only wants to print its help does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'optkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
