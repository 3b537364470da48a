"""JSON Schemas that users hand in, and values checked against a schema: faults as violations with their path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.parse import unquote

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from mainspring_kit.errors import Violation
from pydantic_core import SchemaError, SchemaValidator, core_schema

from mainspring_registry.core.document import JsonValue, path_of

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_META: Final = Draft202012Validator(
    Draft202012Validator.META_SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER
)
_UNBOUNDED: Final = frozenset({"unevaluatedItems", "unevaluatedProperties"})
# Keywords whose members have names, and are schemas.
_NAMED: Final = ("properties", "patternProperties", "$defs", "dependentSchemas")
_SHOWN_CHARACTERS_MAX: Final = 80
_FAULT_CHARACTERS_MAX: Final = 300
_TYPE_NAMES: Final = {
    dict: "an object",
    list: "an array",
    str: "text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


def faults_of(value: JsonValue, schema: Draft202012Validator) -> list[Violation]:
    """What is wrong with a value, one violation per fault, in the order of the paths."""
    found = {violation: None for error in schema.iter_errors(value) for violation in _describe(error)}
    return sorted(found, key=lambda violation: violation.field)


def schema_faults(schema: JsonValue, path: str) -> list[Violation]:
    """What is wrong with a schema that a user hands in: not JSON Schema 2020-12, or it points outside itself."""
    if not isinstance(schema, dict):
        return [Violation(path, "must be an object: a JSON Schema")]
    if schema.get("$schema", DIALECT) != DIALECT:
        return [Violation(_join(path, "$schema"), f"must be {DIALECT} or left out")]
    faults = [
        Violation(_join(path, path_of(list(error.absolute_path))), f"is no JSON Schema: {_cut(error.message)}")
        for error in _META.iter_errors(schema)
    ]
    return faults or list(_reference_faults(schema, path))


def cost_faults(schema: JsonValue, path: str) -> Iterator[Violation]:
    """What of a schema could not be checked in bounded time: patterns that need to go back, and unevaluated members."""
    pending: list[tuple[JsonValue, tuple[str | int, ...]]] = [(schema, ())]
    while pending:
        inner, parts = pending.pop()
        if isinstance(inner, list):
            pending.extend((item, (*parts, index)) for index, item in enumerate(inner))
        if not isinstance(inner, dict):
            continue
        pending.extend((item, (*parts, key)) for key, item in inner.items())
        if parts and parts[-1] in _NAMED:
            continue  # its keys are names that the author chose
        for key in _UNBOUNDED & inner.keys():
            yield Violation(
                _join(path, path_of([*parts, key])), "is not taken: name the members in properties or items"
            )
        patterns = [inner["pattern"]] if isinstance(inner.get("pattern"), str) else []
        if isinstance(inner.get("patternProperties"), dict):
            patterns += inner["patternProperties"]
        for pattern in patterns:
            if fault := _pattern_fault(pattern):
                yield Violation(_join(path, path_of([*parts, "pattern"])), fault)


def _pattern_fault(pattern: str) -> str:
    """Why an engine that never goes back, and so takes linear time, does not take a pattern; empty: it does."""
    try:
        SchemaValidator(core_schema.str_schema(pattern=pattern, strict=True))
    except SchemaError as error:
        return _cut(f"{_show(pattern)} is not taken: {str(error).splitlines()[-1].strip().removeprefix('error: ')}")
    return ""


def _reference_faults(schema: dict[str, JsonValue], path: str) -> Iterator[Violation]:
    """References that do not end in the schema itself: whoever checks values later must fetch nothing, and must end."""
    pending: list[tuple[JsonValue, tuple[str | int, ...]]] = [(schema, ())]
    while pending:
        inner, parts = pending.pop()
        if isinstance(inner, list):
            pending.extend((item, (*parts, index)) for index, item in enumerate(inner))
        if not isinstance(inner, dict):
            continue
        pending.extend((item, (*parts, key)) for key, item in inner.items())
        if parts and isinstance(inner.get("$id"), str):
            yield Violation(_join(path, path_of([*parts, "$id"])), "may be given at the top only")
        for key in ("$ref", "$dynamicRef"):
            if isinstance(inner.get(key), str) and (fault := _follow(schema, inner[key])):
                yield Violation(_join(path, path_of([*parts, key])), fault)


def _follow(schema: dict[str, JsonValue], reference: str) -> str:
    """What is wrong with a reference; empty: nothing. Only JSON pointers into the schema are taken."""
    seen: set[str] = set()
    while reference not in seen:
        seen.add(reference)
        if reference != "#" and not reference.startswith("#/"):
            return f"{_show(reference)} must point into this schema, as in #/$defs/name"
        target: JsonValue = schema
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and name in target:
                target = target[name]
            elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            else:
                return f"{_show(reference)} points at nothing"
        if not isinstance(target, dict) or not isinstance(target.get("$ref"), str):
            return ""
        reference = target["$ref"]
    return f"{_show(reference)} points at itself"


def _describe(error: ValidationError) -> Iterator[Violation]:
    path = path_of(list(error.absolute_path))
    # Any: as the keyword and the value have them.
    instance: Any = error.instance
    limit: Any = error.validator_value
    describe = _DESCRIPTIONS.get(str(error.validator))
    if error.validator == "required":
        for name in limit:
            if name not in instance:
                yield Violation(_join(path, name), "is required")
    elif error.validator == "additionalProperties" and isinstance(error.schema, dict):
        known = error.schema.get("properties", {})
        for name in instance:
            if name not in known:
                yield Violation(_join(path, _cut(name)), f"is not known here; known are {', '.join(sorted(known))}")
    elif describe is not None:
        note = error.schema.get("description", "") if isinstance(error.schema, dict) else ""
        yield Violation(path, describe(instance, limit, note))
    else:
        yield Violation(path, _cut(error.message))


def _name_types(kinds: str | list[str]) -> str:
    return " or ".join(_KIND_NAMES.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds))


_KIND_NAMES: Final = {"object": "an object", "array": "an array", "string": "text", "integer": "an integer"}
# By keyword: the value, what the keyword asks for (any type: Any), and the description beside it.
_DESCRIPTIONS: Final[dict[str, Callable[[JsonValue, Any, str], str]]] = {
    "type": lambda value, kinds, _: f"must be {_name_types(kinds)}, not {_TYPE_NAMES[type(value)]}",
    "const": lambda value, wanted, _: f"must be {wanted}, not {_show(value)}",
    "enum": lambda value, wanted, _: f"must be one of {', '.join(wanted)}, not {_show(value)}",
    "pattern": lambda value, pattern, note: f"{_show(value)} is not {note or 'of the form ' + pattern}",
    "minLength": lambda _, limit, __: f"has fewer than {limit} characters",
    "maxLength": lambda _, limit, __: f"has more than {limit} characters",
    "minItems": lambda _, limit, __: f"has fewer than {limit} entries",
    "maxItems": lambda _, limit, __: f"has more than {limit} entries",
    "minProperties": lambda _, limit, __: f"has fewer than {limit} entries",
    "maxProperties": lambda _, limit, __: f"has more than {limit} entries",
    "uniqueItems": lambda _, __, ___: "holds an entry twice",
    "not": lambda _, __, note: note,
}


def _show(value: JsonValue) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS_MAX else text[:_SHOWN_CHARACTERS_MAX] + "…"


def _cut(text: str) -> str:
    return text if len(text) <= _FAULT_CHARACTERS_MAX else text[:_FAULT_CHARACTERS_MAX] + "…"


def _join(path: str, rest: str) -> str:
    return rest if not path else path if not rest else path + ("" if rest.startswith("[") else ".") + rest
