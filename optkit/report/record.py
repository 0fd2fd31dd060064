"""The record of one trial: what ran, on what, what was measured and what it says. It stores and checks; it computes no verdict.

``report.json`` is a versioned contract. A reader refuses a file of a newer version and a file with keys it does not know; a change
of meaning or a new key raises ``SCHEMA``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from optkit.core.errors import ArtefactError
from optkit.core.files import json_text, read_json
from optkit.core.measurement import Comparison, Measurement, Verdict

SCHEMA = 2
REPORT_FILE = "report.json"


def _utc(text: str) -> str:
    try:
        offset = datetime.fromisoformat(text).utcoffset()
    except ValueError:
        raise ValueError(f"expected a time such as 2026-05-04T13:45:00+00:00, got {text!r}") from None
    if offset != timedelta(0):
        raise ValueError(f"expected a time in UTC, got {text!r}")
    return text


def _plain(value: Any) -> Any:
    """Return the value as plain JSON: tuples as lists, text that UTF-8 can hold; refuse what JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(_plain(str(key))): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no JSON; use null")
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ValueError(f"{type(value).__name__} is no JSON")


Json = Annotated[dict[str, Any], AfterValidator(_plain)]
UtcTime = Annotated[str, AfterValidator(_utc)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """The base of all parts: frozen, unknown keys refused, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_by_name=True, serialize_by_alias=True)


class Run(Record):
    """Which run this was. ``started`` is a UTC time in ISO form, ``seconds`` the wall time of the whole trial."""

    id: str
    name: str
    started: UtcTime
    seconds: float
    quick: bool
    recipe_sha256: str
    stopped_because: str
    command: str | None = None


class Model(Record):
    """The model as it came. ``trained`` is False for random weights, whose quality is withheld."""

    source: str
    parameters: Count
    sha256: str
    trained: bool


class Data(Record):
    """What the quality was judged on."""

    task: str
    corpus: str
    sha256: str
    items: Count
    description: str


class StepRecord(Record):
    """One transform that an arm has been through."""

    name: str
    settings: Json
    execution: Literal["real", "simulated", "neutral"]
    opens_in: str


class Metric(Record):
    """One metric of one arm. ``value`` is null where the result is not a finite number."""

    value: float | None
    unit: str
    samples: tuple[float, ...] = ()
    higher_is_better: bool
    detail: Json = Field(default_factory=dict)

    @classmethod
    def of(cls, measurement: Measurement) -> Metric:
        """Return the record of a measurement.

        A value that is not finite becomes null; samples that are not finite are left out and counted in ``detail.not_finite``.
        """
        finite = tuple(sample for sample in measurement.samples if math.isfinite(sample))
        lost = len(measurement.samples) - len(finite)
        detail = {**measurement.detail, **({"not_finite": lost} if lost else {})}
        return cls(
            value=_finite(measurement.value),
            unit=measurement.unit,
            samples=finite,
            higher_is_better=measurement.higher_is_better,
            detail=detail,
        )


class Arm(Record):
    """One artefact as it was opened and measured. ``ranks`` is the number of processes that served it together."""

    label: str
    history: tuple[StepRecord, ...] = ()
    execution: Literal["real", "simulated"]
    opens_in: str
    dtype: str
    ranks: Annotated[int, Field(ge=1)] = 1
    notes: tuple[str, ...] = ()
    metrics: dict[str, Metric]


class Compared(Record):
    """One metric of an arm against the baseline. ``ratio`` is after/before with its 95 % interval; null where before is zero."""

    arm: str
    metric: str
    before: float | None
    after: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict

    @classmethod
    def of(cls, comparison: Comparison) -> Compared:
        """Return the record of a comparison; numbers that are not finite become null."""
        numbers = {name: _finite(getattr(comparison, name)) for name in ("before", "after", "ratio", "low", "high")}
        return cls(arm=comparison.arm, metric=comparison.metric, verdict=comparison.verdict, **numbers)


class Scaling(Record):
    """The throughput of several ranks against that of another arm; ``efficiency`` is the ratio to as many times that arm."""

    metric: str
    against: str
    ranks: Annotated[int, Field(ge=2)]
    ratio: float | None
    low: float | None
    high: float | None
    efficiency: float | None
    verdict: Verdict

    @classmethod
    def of(cls, comparison: Comparison, against: str, ranks: int, times: int) -> Scaling:
        """Return the record of a comparison with ``times`` of the other arm."""
        numbers = {name: _finite(getattr(comparison, name)) for name in ("ratio", "low", "high")}
        share = None if numbers["ratio"] is None else numbers["ratio"] / times
        return cls(metric=comparison.metric, against=against, ranks=ranks, efficiency=share, verdict=comparison.verdict, **numbers)


class Limit(Record):
    """A ratio that the recipe demands, and whether it held."""

    metric: str
    limit: float
    ratio: float | None
    held: bool


class Report(Record):
    """The full record of one trial, as ``report.json`` holds it."""

    version: Annotated[int, Field(ge=1, alias="schema")] = SCHEMA
    run: Run
    environment: Json
    model: Model
    data: Data | None
    arms: dict[str, Arm]
    comparisons: tuple[Compared, ...] = ()
    noise: tuple[Compared, ...] = ()
    limits: tuple[Limit, ...] = ()
    scaling: tuple[Scaling, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _hangs_together(self) -> Report:
        if "baseline" not in self.arms:
            raise ValueError(f"arms has no 'baseline', only {sorted(self.arms)}")
        unknown = sorted({entry.arm for entry in self.comparisons} - set(self.arms))
        if unknown:
            raise ValueError(f"comparisons name arms that are not there: {unknown}")
        return self

    @property
    def held(self) -> bool:
        """Whether every limit of the recipe held; True without limits."""
        return all(limit.held for limit in self.limits)

    def compared(self, arm: str, metric: str) -> Compared | None:
        """Return the comparison of an arm's metric with the baseline, or None where there is none."""
        return next((entry for entry in self.comparisons if (entry.arm, entry.metric) == (arm, metric)), None)

    def to_json(self) -> str:
        """Return ``report.json`` as text: the same text for the same report, and no NaN."""
        return json_text(self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """Read a report from its file or from the folder of its run.

        Raises:
            ArtefactError: it is missing, damaged, or of a newer version than this program reads.
        """
        file = Path(path) / REPORT_FILE if Path(path).is_dir() else Path(path)
        try:
            document = read_json(file)
        except RecursionError:
            raise ArtefactError(f"{file} is no report: it is nested too deep") from None
        _check_version(file, document)
        try:
            return cls.model_validate_json(json.dumps(document), strict=True)
        except ValidationError as error:
            raise ArtefactError(f"{file} is damaged: {_first_problems(error)}; run the recipe again") from None


def _check_version(file: Path, document: object) -> None:
    version = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtefactError(f"{file} is no report: it has no 'schema' number")
    if version > SCHEMA:
        raise ArtefactError(f"{file} has schema {version}, and this optkit reads up to schema {SCHEMA}; install a newer optkit to read it")


def _first_problems(error: ValidationError, count: int = 3) -> str:
    problems = error.errors(include_url=False, include_input=False)
    told = [f"{'.'.join(str(part) for part in problem['loc']) or 'report'}: {problem['msg']}" for problem in problems[:count]]
    return "; ".join(told) + (f"; and {len(problems) - count} more" if len(problems) > count else "")


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
