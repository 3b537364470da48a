"""What one immutable version of an agent asks for, read once from its specification."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.intrinsic import AGENT_PREFIX, HANDOFF_PREFIX
from mainspring_execution.core.policy import ATTEMPTS_MAX, DEFAULT_POLICIES, RETRIES_DEFAULT, ErrorPolicy
from mainspring_execution.core.schema import Schema

TIMEOUT_SECONDS_DEFAULT: Final = 300.0
TIMEOUT_SECONDS_MAX: Final = 86_400.0
STEPS_DEFAULT: Final = 25
STEPS_MAX: Final = 1_000
CALLS_PER_STEP_MAX: Final = 32

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?")
_UNIT_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, None: 1.0}


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """A version of an agent, ready to be run. `output_schema` None: any result is right."""

    agent: str
    version: str
    provider: str
    # The provider's own part of the specification, JSON values: Any.
    model: Mapping[str, Any]
    instructions: str
    tools: frozenset[str]
    output_schema: Schema | None
    timeout_seconds: float
    steps_max: int
    # Of what is said of them: error classes, and the seconds of tools. Infinite: no bound but the run's own.
    errors: Mapping[str, ErrorPolicy] = field(default_factory=dict)
    retries_max: int = RETRIES_DEFAULT
    step_timeout_seconds: float = math.inf
    model_timeout_seconds: float = math.inf
    tool_timeouts: Mapping[str, float] = field(default_factory=dict)
    # Of the agent's runs RUNNING at once, and of those of one user; 0: any number.
    concurrent_max: int = 0
    concurrent_per_user_max: int = 0
    # Among the tenant's runs in line, unless the start says otherwise.
    priority: int = 0
    # Who is told of the ends of its runs; empty: nobody.
    webhook_url: str = ""
    # Of the agents among the tools: those whose failure ends the run.
    fail_fast: frozenset[str] = frozenset()


def read_plan(agent: types_pb2.Agent) -> AgentPlan:
    """Reads a registered version; SPEC_INVALID when it asks for what this release cannot do."""
    spec = orjson.loads(agent.spec)
    limits = spec.get("limits") or {}
    model = spec.get("model") or {}
    timeout_seconds = read_seconds(limits.get("timeout", TIMEOUT_SECONDS_DEFAULT), field="limits.timeout")
    return AgentPlan(
        agent=agent.name,
        version=agent.version,
        provider=model.get("provider", ""),
        model=model,
        instructions=spec.get("instructions") or "",
        tools=_read_tools(spec),
        webhook_url=spec.get("webhook") or "",
        fail_fast=frozenset(
            AGENT_PREFIX + tool["agent"]
            for tool in spec.get("tools") or ()
            if isinstance(tool, dict) and tool.get("on_failure") == "fail_fast"
        ),
        output_schema=_read_schema(spec.get("output_schema")),
        timeout_seconds=min(timeout_seconds, TIMEOUT_SECONDS_MAX),
        steps_max=min(int(limits.get("max_steps", STEPS_DEFAULT)), STEPS_MAX),
        errors=_read_policies(spec.get("errors") or {}),
        retries_max=int(limits.get("retries", RETRIES_DEFAULT)),
        step_timeout_seconds=read_seconds(limits.get("step_timeout", math.inf), field="limits.step_timeout"),
        model_timeout_seconds=read_seconds(model.get("timeout", math.inf), field="model.timeout"),
        tool_timeouts={
            tool: read_seconds(timeout, field=f"tool_timeouts.{tool}")
            for tool, timeout in (spec.get("tool_timeouts") or {}).items()
        },
        concurrent_max=int(limits.get("max_concurrent", 0)),
        concurrent_per_user_max=int(limits.get("max_concurrent_per_user", 0)),
        priority=int(limits.get("priority", 0)),
    )


def read_seconds(value: object, *, field: str) -> float:
    """A duration of a specification, `100ms`, `30s`, `5m`, `1h` or a number of seconds, in seconds."""
    seconds = parse_seconds(value)
    if seconds is None:
        raise spec_invalid(field, f"{value!r} is not a duration such as 100ms, 30s, 5m or 1h")
    return seconds


def parse_seconds(value: object) -> float | None:
    """As `read_seconds`; None: it is no duration."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    return None if match is None else float(match[1]) * _UNIT_SECONDS[match[2]]


def spec_invalid(field: str, fault: str) -> MainspringError:
    """The error of a specification that cannot be run."""
    return MainspringError(
        Reason.SPEC_INVALID, f"{field}: {fault}. Register a new version of the agent that says it right.", field=field
    )


def _read_tools(spec: Mapping[str, Any]) -> frozenset[str]:
    """The names by which a model calls tools, other agents, and whom it may hand over to. JSON values: Any."""
    tools = {AGENT_PREFIX + tool["agent"] if isinstance(tool, dict) else tool for tool in spec.get("tools") or ()}
    return frozenset(tools | {HANDOFF_PREFIX + name for name in spec.get("handoffs") or ()})


def _read_policies(asked: Mapping[str, Any]) -> dict[str, ErrorPolicy]:
    """What a specification says of classes of errors, JSON values (Any); what it leaves out is as by default."""
    policies = {}
    for name, default in DEFAULT_POLICIES.items():
        if name not in asked:
            continue
        back_off = asked[name].get("backoff") or {}
        policies[name] = ErrorPolicy(
            attempts=min(int(asked[name].get("attempts", default.attempts)), ATTEMPTS_MAX),
            initial_seconds=read_seconds(back_off.get("initial", default.initial_seconds), field=f"errors.{name}"),
            seconds_max=read_seconds(back_off.get("max", default.seconds_max), field=f"errors.{name}"),
            multiplier=float(back_off.get("multiplier", default.multiplier)),
        )
    return policies


def _read_schema(schema: object) -> Schema | None:
    """The registry has checked it, which for a large one takes a second: too long to be done again here."""
    if schema is None or schema == {} or schema is True:
        return None
    if not isinstance(schema, Mapping):
        raise spec_invalid("output_schema", "it is not an object")
    return Schema(schema)
