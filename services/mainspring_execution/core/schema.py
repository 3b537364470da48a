"""An agent's output_schema: results are checked against it in a bounded number of steps, whatever it and they are.

Whoever writes a schema shares the process with all other tenants: without a bound a few nested references, a pattern or
a long array would hold up every run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from pydantic_core import SchemaError, SchemaValidator, core_schema

# What one step is worth: so many members of an array, an object or a keyword, or characters that a pattern is tried on.
STEP_MEMBERS: Final = 8
STEP_CHARACTERS: Final = 4_096
# A compiled pattern takes up to 10 MB, and a tenth of a second to make.
PATTERNS_MAX: Final = 64
PATTERN_STEPS: Final = 1_000

_META: Final = Draft202012Validator(Draft202012Validator.META_SCHEMA)
_UNWANTED: Final = frozenset(
    {"$ref", "$dynamicRef", "$id", "$anchor", "$dynamicAnchor", "$schema", "unevaluatedItems", "unevaluatedProperties"}
)

# A keyword of jsonschema. It is called with the validator, its own value, the instance and the schema around it, all of
# which may be anything: Any.
_Keyword = Callable[..., Iterator[ValidationError] | None]


class TooCostlyError(Exception):
    """The check has used up its steps, or nests too deep: nothing is known of the value."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The first thing that is wrong with a value."""

    path: str
    message: str


@dataclass(slots=True)
class _Check:
    """The steps that the check under way has left."""

    steps: int

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TooCostlyError


_check: Final[ContextVar[_Check]] = ContextVar("mainspring_schema_check")


class Schema:
    """A schema that the registry took, ready for many checks; they may go on in several threads."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        """`schema`: JSON values (Any)."""
        self.document = schema
        self._validator = _Validator(schema)

    def first_fault(self, value: Any, *, steps_max: int) -> Fault | None:
        """What is wrong with a JSON value (Any); None: nothing. TooCostlyError."""
        token = _check.set(_Check(steps_max))
        try:
            error = next(self._validator.iter_errors(value), None)
        except RecursionError as fault:
            raise TooCostlyError from fault
        except SchemaError as fault:
            return Fault("$", f"its schema has a pattern that is not taken: {str(fault).splitlines()[-1].strip()}")
        finally:
            _check.reset(token)
        return None if error is None else Fault(error.json_path, error.message)


def schema_fault(schema: Mapping[str, Any]) -> str:
    """Why a small schema (JSON values: Any) that no registry has seen cannot be used; empty: it can.

    It must say no more than can be checked by itself and in bounded time, so no references either.
    """
    for inner in _objects(schema):
        if unwanted := _UNWANTED & inner.keys():
            return f"{min(unwanted)} is not taken here"
    fault = next(_META.iter_errors(schema), None)
    if fault is not None:
        return f"it is no JSON Schema at {fault.json_path}: {fault.message}"
    for inner in _objects(schema):
        for pattern in (inner.get("pattern"), *(inner.get("patternProperties") or ())):
            if isinstance(pattern, str) and not _is_taken(pattern):
                return f"the pattern {pattern[:100]!r} is not taken"
    return ""


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value (Any), itself included."""
    pending = [value]
    while pending:
        inner = pending.pop()
        if isinstance(inner, list):
            pending.extend(inner)
        elif isinstance(inner, dict):
            pending.extend(inner.values())
            yield inner


def _is_taken(pattern: str) -> bool:
    try:
        SchemaValidator(core_schema.str_schema(pattern=pattern, strict=True))
    except SchemaError:
        return False
    return True


def _size(value: Any) -> int:
    return len(value) // STEP_MEMBERS if isinstance(value, list | dict) else 0


def _counted(keyword: _Keyword) -> _Keyword:
    def check(*asked: Any) -> Iterator[ValidationError] | None:
        _, wanted, value, _ = asked
        _check.get().spend(1 + _size(wanted) + _size(value))
        return keyword(*asked)

    return check


def _is_found(pattern: str, text: str) -> bool:
    _check.get().spend(len(text) // STEP_CHARACTERS)
    return _compiled(pattern).isinstance_python(text)


@lru_cache(maxsize=PATTERNS_MAX)
def _compiled(pattern: str) -> SchemaValidator:
    """The pattern for an engine whose time is linear in the text: Python's own may take for ever, holding the loop."""
    _check.get().spend(PATTERN_STEPS)
    return SchemaValidator(core_schema.str_schema(pattern=pattern, strict=True))


def _pattern(*asked: Any) -> Iterator[ValidationError]:
    _, pattern, value, _ = asked
    if isinstance(value, str) and not _is_found(pattern, value):
        yield ValidationError(f"{value[:100]!r} does not match {pattern!r}")


def _pattern_properties(*asked: Any) -> Iterator[ValidationError]:
    validator, patterns, value, _ = asked
    for pattern, schema in patterns.items() if isinstance(value, dict) else ():
        _check.get().spend(_size(value))
        for name, item in value.items():
            if _is_found(pattern, name):
                yield from validator.descend(item, schema, path=name, schema_path=pattern)


def _additional_properties(*asked: Any) -> Iterator[ValidationError]:
    validator, wanted, value, schema = asked
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, item in value.items() if isinstance(value, dict) else ():
        _check.get().spend(_size(patterns))
        if name in known or any(_is_found(pattern, name) for pattern in patterns):
            continue
        if wanted is False:
            yield ValidationError(f"the additional property {name[:100]!r} is not allowed")
        elif isinstance(wanted, dict):
            yield from validator.descend(item, wanted, path=name)


def _unique_items(*asked: Any) -> Iterator[ValidationError]:
    _, wanted, value, _ = asked
    if wanted and isinstance(value, list) and len({_frozen(item) for item in value}) < len(value):
        yield ValidationError("it has an item twice")


def _frozen(value: Any) -> Hashable:
    """The value as a key: equal where JSON Schema says equal, so 1 and 1.0 are and 1 and true are not."""
    if isinstance(value, list):
        _check.get().spend(1 + _size(value))
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        _check.get().spend(1 + _size(value))
        return frozenset((name, _frozen(item)) for name, item in value.items())
    if isinstance(value, bool):
        return b"true" if value else b"false"
    return value  # type: ignore[no-any-return]  # of JSON's values a text, a number or null


def _unbounded(*asked: Any) -> Iterator[ValidationError]:
    """What jsonschema does in one go, in a time that nothing bounds; the registry refuses it."""
    raise TooCostlyError


_Validator: Final = extend(  # type: ignore[no-untyped-call]  # as the library has it
    Draft202012Validator,
    {name: _counted(keyword) for name, keyword in Draft202012Validator.VALIDATORS.items()}
    | {
        "pattern": _counted(_pattern),
        "patternProperties": _counted(_pattern_properties),
        "additionalProperties": _counted(_additional_properties),
        "uniqueItems": _counted(_unique_items),
        "unevaluatedItems": _counted(_unbounded),
        "unevaluatedProperties": _counted(_unbounded),
    },
)
