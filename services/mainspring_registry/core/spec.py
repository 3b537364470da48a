"""What a specification of an agent must be: the published schema, and what a schema cannot say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from jsonschema import Draft202012Validator
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason, Violation

from mainspring_registry.core.document import DocumentError, JsonValue, read_document, read_json, write_canonical
from mainspring_registry.core.schema import cost_faults, faults_of, schema_faults

SPEC_BYTES_MAX: Final = 256 << 10
DELAY_SECONDS_MAX: Final = 3_600.0
TIMEOUT_SECONDS_MAX: Final = 86_400.0

# Classes of errors of which no other attempt fares better.
_NEVER_REPEATED: Final = ("invalid", "permission")
_DURATION: Final = re.compile(r"([0-9.]+)(ms|s|m|h)")
_UNIT_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0}


def agent_schema(text: bytes) -> Draft202012Validator:
    """The published schema, ready to check with."""
    return Draft202012Validator(read_json(text))


def read_agent(document: bytes, schema: Draft202012Validator) -> types_pb2.Agent:
    """The agent that a document specifies, without version and time. SPEC_INVALID lists every fault with its path."""
    try:
        spec = read_document(document)
    except DocumentError as error:
        raise spec_invalid([error.violation]) from error
    faults = faults_of(spec, schema)
    if isinstance(spec, dict) and isinstance(output_schema := spec.get("output_schema"), dict):
        faults += schema_faults(output_schema, "output_schema") or list(cost_faults(output_schema, "output_schema"))
    if faults := faults or list(_check_meaning(spec)):
        raise spec_invalid(faults)
    canonical = write_canonical(spec).encode()
    if len(canonical) > SPEC_BYTES_MAX:
        raise spec_invalid([Violation("", f"takes {len(canonical)} bytes as JSON; at most {SPEC_BYTES_MAX} are taken")])
    return types_pb2.Agent(
        name=spec["name"],
        description=spec.get("description", ""),
        labels=spec.get("labels", {}),
        capabilities=spec.get("capabilities", []),
        spec=canonical,
    )


def _check_meaning(spec: dict[str, JsonValue]) -> Iterator[Violation]:
    """What is wrong with a specification of the right shape."""
    tools = {f"handoff.{name}" for name in spec.get("handoffs", ())}
    for number, tool in enumerate(spec.get("tools", ())):
        name = f"agent.{tool['agent']}" if isinstance(tool, dict) else tool
        if name in tools:
            yield Violation(f"tools[{number}]", f"{name} is there twice: leave one out")
        tools.add(name)
    for number, step in enumerate(spec["model"].get("script", ())):
        path = f"model.script[{number}]"
        if "calls" in step and "result" in step:
            yield Violation(path, "has calls and a result: a step that ends the run cannot wait for calls")
        if read_seconds(step.get("delay", "0s")) > DELAY_SECONDS_MAX:
            yield Violation(f"{path}.delay", f"is longer than {DELAY_SECONDS_MAX:.0f} s")
        for index, call in enumerate(step.get("calls", ())):
            if call["tool"] not in tools:
                yield Violation(f"{path}.calls[{index}].tool", f"{call['tool']} is not in `tools`: add it there")
            if isinstance(text := call.get("arguments"), str) and not _is_template(text):
                yield Violation(f"{path}.calls[{index}].arguments", "must be an object, or one template for an object")
    yield from _check_times(spec, tools)
    for name in _NEVER_REPEATED:
        if spec.get("errors", {}).get(name, {}).get("attempts", 1) > 1:
            yield Violation(f"errors.{name}.attempts", "must be 1: it fails in the same way however often it is tried")


def _check_times(spec: dict[str, JsonValue], tools: set[str]) -> Iterator[Violation]:
    limits, tool_timeouts = spec.get("limits", {}), spec.get("tool_timeouts", {})
    times = {f"limits.{name}": limits[name] for name in ("timeout", "step_timeout") if name in limits}
    times |= {f"tool_timeouts.{tool}": timeout for tool, timeout in tool_timeouts.items()}
    if "timeout" in spec["model"]:
        times["model.timeout"] = spec["model"]["timeout"]
    for path, timeout in times.items():
        if not 0 < read_seconds(timeout) <= TIMEOUT_SECONDS_MAX:
            yield Violation(path, f"must be more than 0 and at most {TIMEOUT_SECONDS_MAX:.0f} s")
    for tool in sorted(tool_timeouts.keys() - tools):
        yield Violation(f"tool_timeouts.{tool}", f"{tool} is not in `tools`: add it there")


def read_seconds(duration: str) -> float:
    """The seconds of a duration that has the schema's form."""
    match = _DURATION.fullmatch(duration)
    assert match is not None, f"{duration!r} passed the schema and is no duration"
    return float(match[1]) * _UNIT_SECONDS[match[2]]


def _is_template(text: str) -> bool:
    return text.startswith("{{") and text.find("}}") == len(text) - 2


def spec_invalid(faults: list[Violation]) -> MainspringError:
    """SPEC_INVALID with every fault."""
    first = faults[0]
    others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return MainspringError(
        Reason.SPEC_INVALID,
        f"The specification is not valid: {first.field or 'the document'}: {first.description}{others}. "
        "Mend it and register it again.",
        violations=faults,
        field=first.field,
    )
