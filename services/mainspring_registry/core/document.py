"""Reads a document, YAML or JSON, into plain JSON values: bounded, and without what YAML means by surprise.

Of YAML it takes the part that says what JSON says: no aliases, tags, merge keys, dates or `yes`/`no`; a key is text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import yaml
from mainspring_kit.errors import Violation

# What JSON can say. Recursive types cost more words than they save here: Any.
JsonValue: TypeAlias = Any

DEPTH_MAX: Final = 32
VALUES_MAX: Final = 20_000
INTEGER_MIN: Final = -(2**63)
INTEGER_MAX: Final = 2**63 - 1

_PLAIN: Final = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER: Final = re.compile(r"[-+]?[0-9]{1,20}")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class DocumentError(Exception):
    """The document cannot be read; `violation` says where and why."""

    def __init__(self, where: str, fault: str) -> None:
        super().__init__(fault)
        self.violation = Violation(where, fault)


def read_document(document: bytes) -> JsonValue:
    """The document's value. Raises DocumentError, with the line where there is one."""
    text = _decode(document)
    if text.lstrip().startswith("{"):
        try:
            return _check(_read_json(text))
        except json.JSONDecodeError:
            pass  # YAML may also begin with a brace
    return _check(_read_yaml(text))


def read_json(document: bytes) -> JsonValue:
    """The value of a document that must be JSON. Raises DocumentError."""
    try:
        return _check(_read_json(_decode(document)))
    except json.JSONDecodeError as error:
        raise DocumentError("", f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error


def write_canonical(value: JsonValue) -> str:
    """The value as JSON with sorted keys and no spaces: equal values are equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def path_of(parts: Iterator[str | int] | list[str | int]) -> str:
    """`model.script[0].calls` of its parts."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _decode(document: bytes) -> str:
    try:
        return document.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError("", f"is not UTF-8 at byte {error.start}") from error


def _read_json(text: str) -> JsonValue:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise DocumentError("", f"is nested deeper than {DEPTH_MAX}") from error
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError):
            raise
        # Python reads no integer of more than some thousand digits.
        raise DocumentError("", "holds a number outside 64 bits: write it as text") from error


def _unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DocumentError("", f"has the key {twice!r} twice in one object")
    return found


def _refuse_constant(name: str) -> JsonValue:
    raise DocumentError("", f"holds {name}, which is no JSON value")


def _read_yaml(text: str) -> JsonValue:
    try:
        events = yaml.parse(text, Loader=yaml.CSafeLoader)
        next(events)  # the stream begins
        if isinstance(next(events), yaml.StreamEndEvent):
            raise DocumentError("", "is empty")
        value = _read_node(events, next(events), depth=0)
        next(events)  # the document ends
        event = next(events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise _fault(event, "a second document begins: send one at a time")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise DocumentError("", f"{where}is neither YAML nor JSON: {getattr(error, 'problem', error)}") from error
    return value


# Any: PyYAML's events have no types of their own.
def _read_node(events: Iterator[Any], event: Any, *, depth: int) -> JsonValue:
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _fault(event, "anchors and aliases are not taken: write the value out")
    if event.tag is not None:
        raise _fault(event, "tags are not taken: write a plain value")
    if isinstance(event, yaml.ScalarEvent):
        return _read_scalar(event)
    if depth == DEPTH_MAX:
        raise _fault(event, f"is nested deeper than {DEPTH_MAX}")
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_read_node(events, event, depth=depth + 1))
        return items
    found: dict[str, JsonValue] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or event.anchor is not None:
            raise _fault(event, "a key must be plain text")
        if event.value in found:
            raise _fault(event, f"has the key {event.value!r} twice in one mapping")
        found[event.value] = _read_node(events, next(events), depth=depth + 1)
    return found


def _read_scalar(event: yaml.ScalarEvent) -> JsonValue:
    text = event.value
    if not event.implicit[0]:  # quoted, or a block of text
        return text
    if text.lower() in _PLAIN and text in (text.lower(), text.upper(), text.capitalize()):
        return _PLAIN[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _fault(event: Any, fault: str) -> DocumentError:
    """Any: as in _read_node."""
    return DocumentError("", f"line {event.start_mark.line + 1}, column {event.start_mark.column + 1}: {fault}")


def _check(value: JsonValue) -> JsonValue:
    """Refuses what is too deep or too much, and what not every reader of JSON or text column of SQL can hold."""
    pending: list[tuple[JsonValue, tuple[str | int, ...]]] = [(value, ())]
    values = 0
    while pending:
        inner, parts = pending.pop()
        values += 1
        if values > VALUES_MAX:
            raise DocumentError("", f"holds more than {VALUES_MAX} values")
        if isinstance(inner, dict | list):
            if len(parts) == DEPTH_MAX:
                raise DocumentError(path_of(list(parts)), f"is nested deeper than {DEPTH_MAX}")
            pairs = inner.items() if isinstance(inner, dict) else enumerate(inner)
            for key, item in pairs:
                if isinstance(key, str):
                    _check_text(key, parts)
                pending.append((item, (*parts, key)))
        elif isinstance(inner, str):
            _check_text(inner, parts)
        elif isinstance(inner, float) and not math.isfinite(inner):
            raise DocumentError(path_of(list(parts)), "is a number too large: write it as text")
        elif isinstance(inner, int) and not INTEGER_MIN <= inner <= INTEGER_MAX:
            raise DocumentError(path_of(list(parts)), "is a number outside 64 bits: write it as text")
    return value


def _check_text(text: str, parts: tuple[str | int, ...]) -> None:
    if "\x00" in text:
        raise DocumentError(path_of(list(parts)), "holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(path_of(list(parts)), "holds half a surrogate pair, which is no character") from error
