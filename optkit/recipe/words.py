"""Settings from plain data, with findings in our own words: place, culprit, remedy. Rare kinds of findings keep pydantic's text."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from optkit.core.errors import OptkitError
from optkit.core.registry import did_you_mean
from optkit.core.settings import Settings
from optkit.recipe.scalars import scalar
from optkit.recipe.trail import Fault, Trail, quoted, shown, value_at

MOST_FAULTS = 50

Kind = TypeVar("Kind", bound=Settings)

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "must be at least"),
    "greater_than": ("gt", "must be more than"),
    "less_than_equal": ("le", "must be at most"),
    "less_than": ("lt", "must be less than"),
    "multiple_of": ("multiple_of", "must be a multiple of"),
}


def settings_of(kind: type[Kind], data: Mapping[str, Any], trail: Trail) -> tuple[Kind | None, list[Fault]]:
    """Return the settings made from plain data, or None with everything that is wrong in them.

    YAML's kinds are kept apart: a list becomes a tuple and a whole number may stand for a float; nothing else is converted.
    """
    try:
        return kind.model_validate_json(json.dumps(data)), []
    except ValidationError as error:
        return None, [Fault((*trail, *fault.trail), fault.message) for fault in faults_of(error, kind, data)]
    except OptkitError as error:
        return None, [Fault(trail, str(error))]


def faults_of(error: ValidationError, kind: type[BaseModel], data: Any) -> list[Fault]:
    """Return the findings of pydantic about ``data`` as faults, with trails relative to it."""
    faults: list[Fault] = []
    choices: dict[Trail, dict[str, list[_Finding]]] = {}
    for details in error.errors(include_url=False, include_input=False):
        finding = _locate(kind, details)
        if _is_echo(finding, data):
            continue
        if finding.choice is None:
            faults.append(Fault(finding.trail, _message(finding, data)))
        else:
            choices.setdefault(finding.choice[0], {}).setdefault(finding.choice[1], []).append(finding)
        if len(faults) >= MOST_FAULTS:
            break
    for trail, members in choices.items():
        faults += _faults_of_choice(trail, members, data)
    return faults


@dataclass(frozen=True)
class _Finding:
    """One error of pydantic. ``choice`` is the place of a union and the member that was tried; ``owner`` the settings around."""

    trail: Trail
    details: Any
    owner: type[BaseModel] | None
    choice: tuple[Trail, str] | None


def _is_echo(finding: _Finding, data: Any) -> bool:
    """Say whether a list is called too short only because an entry of it is wrong."""
    value = value_at(data, finding.trail)
    return finding.details["type"] == "too_short" and isinstance(value, list | dict) and len(value) >= finding.details["ctx"]["min_length"]


def _locate(kind: type[BaseModel], details: Any) -> _Finding:
    trail: Trail = ()
    current: Any = kind
    owner: type[BaseModel] | None = None
    choice: tuple[Trail, str] | None = None
    for part in details["loc"]:
        current, members = _bare(current)
        if len(members) > 1:
            choice = choice or (trail, str(part))
            current = next((member for member in members if getattr(_bare(member)[0], "__name__", None) == part), None)
            continue
        if part == "[key]":
            break
        trail = (*trail, part)
        owner = current if isinstance(current, type) and issubclass(current, BaseModel) else None
        current = _inside(current, part)
    return _Finding(trail, details, owner, choice)


def _bare(kind: Any) -> tuple[Any, list[Any]]:
    """Return a type without Annotated and None, and the members where it is a choice among several."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, types.UnionType):
            members = [member for member in get_args(kind) if member is not type(None)]
            if len(members) > 1:
                return kind, members
            kind = members[0]
        else:
            return kind, [kind]


def _inside(kind: Any, part: str | int) -> Any:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        found = kind.model_fields.get(str(part))
        return found.annotation if found else None
    arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
    if get_origin(kind) is Literal or not arguments:
        return None
    return arguments[min(part, len(arguments) - 1)] if isinstance(part, int) else arguments[-1]


def _faults_of_choice(trail: Trail, members: Mapping[str, list[_Finding]], data: Any) -> list[Fault]:
    """Report the member that the value comes nearest to; where it is none of them, say what they expect."""
    value = value_at(data, trail)
    near = [found for found in members.values() if not any(_is_wrong_kind(finding, trail) for finding in found)]
    if near:
        return [Fault(finding.trail, _message(finding, data)) for finding in min(near, key=len)]
    findings = [finding for found in members.values() for finding in found if _is_wrong_kind(finding, trail)]
    expected = dict.fromkeys(_EXPECTED[finding.details["type"]] for finding in findings)
    return [Fault(trail, f"expected {' or '.join(expected)}, got {shown(value)}")]


def _is_wrong_kind(finding: _Finding, trail: Trail) -> bool:
    return finding.trail == trail and finding.details["type"] in _EXPECTED


def _message(finding: _Finding, data: Any) -> str:
    kind, context = finding.details["type"], finding.details.get("ctx", {})
    value = value_at(data, finding.trail)
    if kind == "extra_forbidden":
        return f"unknown key {quoted(str(finding.trail[-1]))}{did_you_mean(str(finding.trail[-1]), _fields(finding.owner))}"
    if kind == "missing":
        return f"is missing{_described(finding)}; add it"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {shown(value)}{_quotes_hint(kind, value)}"
    if kind in ("literal_error", "enum"):
        return _not_one_of(str(context["expected"]), value)
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{words} {_number(context[key])}, got {shown(value)}"
    if kind in ("too_short", "too_long"):
        bound = f"at least {context.get('min_length')}" if kind == "too_short" else f"at most {context.get('max_length')}"
        return f"needs {bound} entries, got {context.get('actual_length')}"
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    text = str(finding.details["msg"])
    return f"{text[:1].lower()}{text[1:]}, got {shown(value)}"


def _not_one_of(expected: str, value: Any) -> str:
    known = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
    near = did_you_mean(value, known) if isinstance(value, str) else ""
    one_of = "one of " if len(known) > 1 else ""
    return f"expected {one_of}{expected}, got {shown(value)}{near if near.startswith('; did') else ''}"


def _number(bound: Any) -> str:
    return str(int(bound)) if isinstance(bound, float) and bound.is_integer() else str(bound)


def _fields(owner: type[BaseModel] | None) -> list[str]:
    return list(owner.model_fields) if owner else []


def _described(finding: _Finding) -> str:
    found = finding.owner.model_fields.get(str(finding.trail[-1])) if finding.owner else None
    return f" ({found.description})" if found and found.description else ""


def _quotes_hint(kind: str, value: Any) -> str:
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if kind != "string_type" and isinstance(value, str) and len(value) <= 30:
        try:
            wanted: tuple[type, ...] = {"int_type": (int,), "float_type": (int, float), "bool_type": (bool,)}.get(kind, ())
            return "; remove the quotes" if isinstance(scalar(value), wanted) else ""
        except ValueError:
            return ""
    return ""
