"""Where the time of requests goes: one record, as JSON, as tables, and as a picture of stacked bars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optkit.core import files
from optkit.report.metrics import number
from optkit.report.stacked import stacked_bars
from optkit.report.table import markdown_table

SCHEMA = 1
_HEADERS = ("stage", "ms", "share", "MFLOP", "MB", "cycles", "GFLOP/s", "share of peak", "GB/s", "share of roof")


@dataclass(frozen=True)
class ArmProfile:
    """One arm. ``phases`` are as ``optkit.measure.stages`` tells them: ``total_ms``, ``sum_ms``, ``watched_ms`` and ``stages``."""

    name: str
    engine: str
    dtype: str
    parameters: int
    phases: Mapping[str, Any]
    ticks_per_second: float | None
    read_bytes_per_second: float
    peak_flops: Mapping[str, float]
    counted: Mapping[str, float]
    unavailable: Mapping[str, str]

    @classmethod
    def of(cls, name: str, facts: Mapping[str, Any], found: Mapping[str, Any]) -> ArmProfile:
        """Return the profile of an arm from what its process has told."""
        return cls(name, facts["engine"] or "the model's own forward", facts["dtype"], facts["parameters"], **found)


@dataclass(frozen=True)
class ProfileReport:
    """All arms, the sizes of the requests, and the machine."""

    name: str
    model: str
    sizes: Mapping[str, int]
    environment: Mapping[str, Any]
    arms: tuple[ArmProfile, ...]

    def to_json(self) -> str:
        """Return the profile as JSON: ``arms``, each with ``phases`` of ``total_ms`` and ``stages`` (ms, flops, bytes, cycles)."""
        return files.json_text({"schema": SCHEMA, **asdict(self)})

    def to_markdown(self) -> str:
        """Return a table for each phase of each arm, with what its sum and its watching came to."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes.items())
        lines = [f"# {self.name}", "", f"- {self.model}; {sizes}; {self.environment['cpu']}, threads {self.environment['threads']}"]
        for arm in self.arms:
            lines.append(f"- {arm.name}: {arm.dtype}, {arm.parameters:,} parameters; {arm.engine}")
            lines += [f"- {arm.name}, a whole request: {name.replace('_', ' ')} {value:,.0f}" for name, value in arm.counted.items()]
        for what, why in self.arms[0].unavailable.items():
            lines.append(f"- unavailable: {what}: {why}")
        for arm in self.arms:
            for phase, found in arm.phases.items():
                lines += ["", f"## {arm.name}, {phase}", "", *_table(arm, found), "", _sums(found)]
        return "\n".join(lines) + "\n"


def write_profile(report: ProfileReport, folder: Path) -> None:
    """Write ``profile.json``, ``table.md`` and ``stages.svg`` into a folder.

    Raises:
        ResourceError: the disk is full.
        PlaceError: the folder cannot be written.
    """
    files.write_text(folder / "profile.json", report.to_json())
    files.write_text(folder / "table.md", report.to_markdown())
    bars = {
        f"{arm.name}, {phase}": {name: stage["ms"] for name, stage in found["stages"].items()}
        for arm in report.arms
        for phase, found in arm.phases.items()
    }
    files.write_text(folder / "stages.svg", stacked_bars(bars, "share of the time, %", f"{report.name}: where the time goes"))


def _table(arm: ArmProfile, phase: Mapping[str, Any]) -> list[str]:
    peak = max(arm.peak_flops.values())
    rows = []
    for name, stage in phase["stages"].items():
        seconds = stage["ms"] / 1e3
        flops, read = (stage[key] / seconds if seconds else 0.0 for key in ("flops", "bytes"))
        rows.append(
            (
                name,
                number(stage["ms"]),
                f"{stage['ms'] / phase['sum_ms']:.0%}",
                number(stage["flops"] / 1e6) if stage["flops"] else "-",
                number(stage["bytes"] / 1e6) if stage["bytes"] else "-",
                "-" if stage["cycles"] is None else f"{stage['cycles']:,.0f}",
                number(flops / 1e9) if flops else "-",
                f"{flops / peak:.0%}" if flops else "-",
                number(read / 1e9) if read else "-",
                f"{read / arm.read_bytes_per_second:.0%}" if read else "-",
            )
        )
    return markdown_table(_HEADERS, rows)


def _sums(phase: Mapping[str, Any]) -> str:
    total, sum_, watched = phase["total_ms"], phase["sum_ms"], phase["watched_ms"]
    return (
        f"The stages make {number(sum_)} ms, the untouched whole {number(total)} ms ({sum_ / total - 1:+.1%}). Watched, it took "
        f"{number(watched)} ms ({watched / total - 1:+.1%}); what watching costs is taken off the stages."
    )
