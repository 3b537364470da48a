"""What a tool's declaration must be, which version it is, and when it collides with the one that is registered."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Final

from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason, Violation

from mainspring_registry.core.document import DocumentError, read_json, write_canonical
from mainspring_registry.core.schema import schema_faults

NAME_CHARACTERS_MAX: Final = 128
DESCRIPTION_BYTES_MAX: Final = 4 << 10
SCHEMA_BYTES_MAX: Final = 64 << 10
TIMEOUT_MIN: Final = timedelta(milliseconds=1)
TIMEOUT_MAX: Final = timedelta(hours=1)
VERSION_DIGITS: Final = 12
# Execution serves what begins so itself: no worker could be asked.
RESERVED: Final = ("run.", "human.", "agent.", "handoff.")

_NAME: Final = re.compile(r"[a-z][a-z0-9]*([._-][a-z0-9]+)*")


def read_tools(declared: Sequence[types_pb2.Tool], *, shared: bool) -> list[types_pb2.Tool]:
    """The tools with their versions, as they will be stored. REQUEST_INVALID lists every fault with its path."""
    faults = [fault for index, tool in enumerate(declared) for fault in _check(tool, f"tools[{index}]")]
    names: set[str] = set()
    for index, tool in enumerate(declared):
        if tool.name in names:
            faults.append(Violation(f"tools[{index}].name", f"{tool.name} is declared twice in this request"))
        names.add(tool.name)
    if faults:
        raise MainspringError(
            Reason.REQUEST_INVALID,
            f"The tools are not valid: {faults[0].field}: {faults[0].description}. Mend them and register them again.",
            violations=faults,
            field=faults[0].field,
        )
    return [_complete(tool, shared=shared) for tool in declared]


def changed_tools(wanted: Sequence[types_pb2.Tool], stored: Mapping[str, types_pb2.Tool]) -> list[types_pb2.Tool]:
    """Those that must be written, given those stored that the owner may call. TOOL_CONFLICT when one's effect differs.

    A tool's effect class says what a crash in mid-call means, so it never changes under runs that are under way.
    """
    changed = []
    for tool in wanted:
        known = stored.get(tool.name)
        if known is not None and known.effect != tool.effect:
            raise MainspringError(
                Reason.TOOL_CONFLICT,
                f"The tool {tool.name} is registered as {_effect_name(known)} and cannot become {_effect_name(tool)}: "
                "register it under another name.",
                tool=tool.name,
            )
        if known is None or known.version != tool.version or known.shared != tool.shared:
            changed.append(tool)
    return changed


def _check(tool: types_pb2.Tool, path: str) -> Iterator[Violation]:
    if not _NAME.fullmatch(tool.name) or len(tool.name) > NAME_CHARACTERS_MAX:
        yield Violation(
            f"{path}.name",
            "must be lower-case words joined by dots, dashes and underscores, beginning with a letter, "
            f"at most {NAME_CHARACTERS_MAX} characters",
        )
    if tool.name.startswith(RESERVED):
        yield Violation(f"{path}.name", f"must not begin with {', '.join(RESERVED)}: these are the platform's own")
    if len(tool.description.encode()) > DESCRIPTION_BYTES_MAX:
        yield Violation(f"{path}.description", f"is longer than {DESCRIPTION_BYTES_MAX} bytes")
    if "\x00" in tool.description:
        yield Violation(f"{path}.description", "holds a NUL character")
    yield from _check_schema(tool.input_schema, f"{path}.input_schema")
    if tool.effect not in types_pb2.EffectClass.values() or tool.effect == types_pb2.EFFECT_CLASS_UNSPECIFIED:
        yield Violation(f"{path}.effect", "must be pure, idempotent, keyed or unsafe")
    if tool.HasField("timeout"):
        seconds = tool.timeout.seconds + tool.timeout.nanos / 1e9
        if not TIMEOUT_MIN.total_seconds() <= seconds <= TIMEOUT_MAX.total_seconds():
            yield Violation(f"{path}.timeout", "must be from 1 ms to 1 h")


def _check_schema(text: bytes, path: str) -> Iterator[Violation]:
    if len(text) > SCHEMA_BYTES_MAX:
        yield Violation(path, f"is longer than {SCHEMA_BYTES_MAX} bytes")
        return
    try:
        schema = read_json(text)
    except DocumentError as error:
        yield Violation(path, error.violation.description)
        return
    yield from schema_faults(schema, path)
    if isinstance(schema, dict) and schema.get("type", "object") != "object":
        yield Violation(f"{path}.type", "must be object: arguments have names")


def _complete(tool: types_pb2.Tool, *, shared: bool) -> types_pb2.Tool:
    complete = types_pb2.Tool()
    complete.CopyFrom(tool)
    timeout = None
    if tool.HasField("timeout"):
        timeout = tool.timeout.ToTimedelta()  # to the microsecond, as PostgreSQL keeps it
        complete.timeout.FromTimedelta(timeout)
    declaration = {
        "name": tool.name,
        "description": tool.description,
        "input_schema": read_json(tool.input_schema),
        "effect": tool.effect,
        "timeout": timeout.total_seconds() if timeout is not None else None,
    }
    complete.version = hashlib.sha256(write_canonical(declaration).encode()).hexdigest()[:VERSION_DIGITS]
    complete.shared = shared
    return complete


def _effect_name(tool: types_pb2.Tool) -> str:
    return types_pb2.EffectClass.Name(tool.effect).removeprefix("EFFECT_CLASS_").lower()
