"""The tables in docs/ that are made from the code: `python -m tests.tidy.tables` writes them anew."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Final

from google.rpc import code_pb2
from mainspring.v1 import errors_pb2
from mainspring_kit.config import ENVIRONMENT_PREFIX, ProcessSettings, ServiceSettings
from pydantic.fields import FieldInfo

from tests.tidy.source import ROOT, SERVICES
from tests.tidy.test_contracts import documented_reasons

MARKED: Final = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def settings_classes(service: str) -> list[type[ProcessSettings]]:
    """The settings classes of a service: the serving one first, then what its other commands read."""
    config = import_module(f"mainspring_{service}.config")
    found = [
        value
        for value in vars(config).values()
        if isinstance(value, type) and issubclass(value, ProcessSettings) and value.__module__ == config.__name__
    ]
    return sorted(found, key=lambda value: not issubclass(value, ServiceSettings))


def settings() -> str:
    """Every variable that a process reads: those of all processes first, then by process, in the order of the code."""
    readers: dict[tuple[str, str, str], list[str]] = {}
    for service in SERVICES:
        serving, *others = settings_classes(service)
        for name, field in serving.model_fields.items():
            readers.setdefault((name, _default(field), field.description or ""), []).append(service)
        for other in others:
            for name, field in other.model_fields.items():
                if name not in serving.model_fields:
                    readers.setdefault((name, _default(field), field.description or ""), []).append(
                        f"{service} migrate"
                    )
    lines = ["| variable | default | what it is | read by |", "|---|---|---|---|"]
    for (name, default, description), found in sorted(readers.items(), key=lambda row: len(row[1]) < len(SERVICES)):
        who = "all" if len(found) == len(SERVICES) else ", ".join(found)
        lines.append(f"| `{ENVIRONMENT_PREFIX}{name.upper()}` | {default} | {description} | {who} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "made"
    return f"`{field.default}`" if field.default != "" else "none"


def errors() -> str:
    """Every reason with its ways out and its metadata."""
    reasons = documented_reasons()
    lines = ["| reason | gRPC | HTTP | socket closes | metadata |", "|---|---|---|---|---|"]
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values:
        if value.number:
            rule = value.GetOptions().Extensions[errors_pb2.rule]
            name = value.name.removeprefix("ERROR_REASON_")
            code = "any" if rule.code == code_pb2.UNKNOWN else code_pb2.Code.Name(rule.code)
            keys = ", ".join(sorted(reasons[name][1])) or "–"
            lines.append(f"| {name} | {code} | {rule.http_status} | {rule.close_code or '–'} | {keys} |")
    return "\n".join(lines) + "\n"


def agent() -> str:
    """Every field of an agent's specification, as its published schema has it."""
    schema = json.loads((ROOT / "services/mainspring_registry/agent.schema.json").read_text())
    lines = ["| field | type | what it is |", "|---|---|---|"]
    for path, field, is_required in _fields(schema, schema["$defs"], path=""):
        must = " (required)" if is_required else ""
        lines.append(f"| `{path}`{must} | {_type(field, schema['$defs'])} | {field['description']} |")
    return "\n".join(lines) + "\n"


# Any in these three: a JSON Schema is whatever JSON it is.
def _fields(part: Any, defs: Any, *, path: str) -> Iterator[tuple[str, Any, bool]]:
    for name, field in part.get("properties", {}).items():
        yield path + name, field, name in part.get("required", ())
        inner, inner_path = _resolve(field, defs), f"{path}{name}."
        if "items" in inner:
            inner, inner_path = _resolve(inner["items"], defs), f"{path}{name}[]."
        yield from _fields(inner, defs, path=inner_path)


def _resolve(field: Any, defs: Any) -> Any:
    return defs[field["$ref"].rpartition("/")[2]] if "$ref" in field else field


def _type(field: Any, defs: Any) -> str:
    resolved = _resolve(field, defs)
    if "const" in resolved:
        return f"`{resolved['const']}`"
    if "enum" in resolved:
        return "one of " + ", ".join(f"`{value}`" for value in resolved["enum"])
    if "items" in resolved:
        return f"list of {_type(resolved['items'], defs)}"
    if "pattern" in resolved and "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    kinds = resolved.get("type", "any value")
    return " or ".join([kinds] if isinstance(kinds, str) else kinds)


TABLES: Final[dict[str, Callable[[], str]]] = {"settings": settings, "errors": errors, "agent": agent}


def with_tables(page: str) -> str:
    """A page with each marked table made anew."""
    return MARKED.sub(lambda match: match[1] + TABLES[match["name"]]() + match[3], page)


if __name__ == "__main__":
    for path in (ROOT / "docs").glob("*.md"):
        path.write_text(with_tables(path.read_text()))
