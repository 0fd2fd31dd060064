"""Text to plain data with a line for every value, from PyYAML's events. What no recipe needs is refused before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml import events

from optkit.recipe.scalars import forbidden_character, scalar
from optkit.recipe.trail import Fault, Trail, quoted, shown

MOST_BYTES = 1_000_000
MOST_LINES = 10_000
MOST_DEPTH = 32
MOST_VALUES = 10_000
LONGEST_KEY = 200


@dataclass
class Document:
    """Plain data (dict, list, text, numbers, true, false, None), the line of every value, and what is wrong with the text.

    ``faults`` come with their line. ``lost`` are the values that a fault took away. Where ``broken`` is set the data is not
    complete and should not be judged further.
    """

    data: Any = None
    lines: dict[Trail, int] = field(default_factory=dict)
    faults: list[tuple[int, Fault]] = field(default_factory=list)
    lost: set[Trail] = field(default_factory=set)
    broken: bool = False


def parse_recipe(raw: bytes) -> Document:
    """Read the bytes of a recipe: one YAML document with a mapping at the top. Never raises; see ``Document.faults``."""
    text = _decode(raw)
    document = text if isinstance(text, Document) else parse_text(text)
    if document.broken:
        return document
    if document.data is None and not document.faults:
        return _refusal(0, "the file is empty; it needs at least a name")
    if not isinstance(document.data, dict):
        first = document.lines.get((), 1)
        message = f"expected keys with values, such as 'name: my-recipe', got {shown(document.data)}"
        return Document(faults=[*document.faults, (first, Fault((), message))], broken=True)
    return document


def parse_text(text: str) -> Document:
    """Read one YAML document of any kind. Never raises; see ``Document.faults``."""
    found = forbidden_character(text)
    if found:
        position, name = found
        return _refusal(text.count("\n", 0, position) + 1, f"the character {name} is not allowed; remove it")
    if len(text.splitlines()) > MOST_LINES:
        return _refusal(0, f"the file has more than {MOST_LINES:,} lines; a recipe is a few lines")
    return _Reader(text).document()


def _decode(raw: bytes) -> str | Document:
    if len(raw) > MOST_BYTES:
        return _refusal(0, f"the file is larger than {MOST_BYTES:,} bytes; a recipe is a few lines")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return _refusal(line, f"byte {raw[error.start]:#04x} is no UTF-8; save the file as UTF-8")


def _refusal(line: int, message: str) -> Document:
    return Document(faults=[(line, Fault((), message))], broken=True)


class _StoppedError(Exception):
    """Ends the reading: the rest of the text cannot be trusted to mean anything."""


class _Reader:
    """Builds plain data from events. Anchors, aliases, tags and merges become faults where they stand."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[events.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._result = Document()
        self._values = 0
        self._recording = True
        self._last_line = 1

    def document(self) -> Document:
        try:
            self._read()
        except _StoppedError:
            self._result.broken = True
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = ", ".join(part for part in (error.context, error.problem) if part)
            self._break(mark.line + 1 if mark else self._last_line, f"this is no valid YAML: {what}")
        except (yaml.YAMLError, ValueError, OverflowError):  # the scanner lets the last two through for impossible escapes and versions
            self._break(self._last_line, "this is no valid YAML: a character or escape that cannot be read")
        return self._result

    def _break(self, line: int, message: str) -> None:
        self._fault(line, (), message)
        self._result.broken = True

    def _read(self) -> None:
        documents = 0
        while not isinstance(event := self._next(), events.StreamEndEvent):
            if isinstance(event, events.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._stop(event, (), "a second document starts here; a recipe is one document, remove the '---'")
                if event.tags:
                    self._fault(_line(event), (), "%TAG is not allowed in a recipe; remove it")
                self._result.data = self._value(self._next(), (), 0)

    def _next(self) -> events.Event:
        event = next(self._events)
        self._last_line = _line(event)
        return event

    def _value(self, event: events.Event, trail: Trail, depth: int) -> Any:
        self._values += 1
        if self._values > MOST_VALUES:
            self._stop(event, (), f"more than {MOST_VALUES:,} values; a recipe is a few lines")
        if self._recording:
            self._result.lines.setdefault(trail, _line(event))
        self._refuse_extras(event, trail)
        if isinstance(event, events.ScalarEvent):
            return self._scalar(event, trail)
        if isinstance(event, events.AliasEvent):
            return None
        if depth >= MOST_DEPTH:
            self._stop(event, trail[:4], f"nested deeper than {MOST_DEPTH} levels")
        return self._list(trail, depth) if isinstance(event, events.SequenceStartEvent) else self._mapping(trail, depth)

    def _refuse_extras(self, event: events.Event, trail: Trail) -> None:
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, events.AliasEvent):
            self._lose(event, trail, f"alias *{anchor} is not allowed in a recipe; write the value out")
        elif anchor is not None:
            self._fault(_line(event), trail, f"anchor &{anchor} is not allowed in a recipe; remove it")
        if tag is not None:
            self._lose(event, trail, f"tag {quoted(tag)} is not allowed: a recipe is data; remove it")

    def _scalar(self, event: events.ScalarEvent, trail: Trail) -> Any:
        found = forbidden_character(event.value)
        if found:
            return self._lose(event, trail, f"the character {found[1]} is not allowed; remove it")
        try:
            return event.value if event.style else scalar(event.value)
        except ValueError as error:
            return self._lose(event, trail, str(error))

    def _list(self, trail: Trail, depth: int) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := self._next(), events.SequenceEndEvent):
            found.append(self._value(event, (*trail, len(found)), depth + 1))
        return found

    def _mapping(self, trail: Trail, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        while not isinstance(event := self._next(), events.MappingEndEvent):
            key = self._key(event, trail, depth)
            if key is None or key in first_lines:
                if key is not None:
                    message = f"key {quoted(key)} stands twice, in lines {first_lines[key]} and {_line(event)}; remove one"
                    self._fault(_line(event), (*trail, key), message)
                self._aside(self._next(), (*trail, key or "?"), depth + 1)
                continue
            first_lines[key] = _line(event)
            if self._recording:
                self._result.lines[(*trail, key)] = _line(event)
            found[key] = self._value(self._next(), (*trail, key), depth + 1)
        return found

    def _key(self, event: events.Event, trail: Trail, depth: int) -> str | None:
        known = len(self._result.faults)
        value = self._aside(event, trail, depth + 1)
        if len(self._result.faults) > known:
            return None
        if value == "<<" and isinstance(event, events.ScalarEvent) and not event.style:
            self._fault(_line(event), trail, "merge key << is not allowed in a recipe; write the keys out, or use extends")
        elif not isinstance(value, str):
            self._fault(_line(event), trail, f"a key must be text, got {shown(value)}; put it in quotes")
        elif not 1 <= len(value) <= LONGEST_KEY:
            self._fault(_line(event), trail, f"a key must have 1 to {LONGEST_KEY} characters, got {len(value)}")
        else:
            return value
        return None

    def _aside(self, event: events.Event, trail: Trail, depth: int) -> Any:
        """Read what does not become part of the data: a key, or the value of a key that is refused."""
        before, self._recording = self._recording, False
        value = self._value(event, trail, depth)
        self._recording = before
        return value

    def _lose(self, event: events.Event, trail: Trail, message: str) -> None:
        if self._recording:
            self._result.lost.add(trail)
        self._fault(_line(event), trail, message)

    def _stop(self, event: events.Event, trail: Trail, message: str) -> None:
        self._fault(_line(event), trail, message)
        raise _StoppedError

    def _fault(self, line: int, trail: Trail, message: str) -> None:
        self._result.faults.append((line, Fault(trail, message)))


def _line(event: events.Event) -> int:
    mark = event.start_mark
    return int(mark.line) + 1 if mark is not None else 1
