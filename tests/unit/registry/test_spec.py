"""Specifications of agents: the published schema and what goes beyond it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from mainspring_kit.errors import MainspringError
from mainspring_registry.core.spec import SPEC_BYTES_MAX, agent_schema, read_agent

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
SCHEMA = agent_schema((ROOT / "services/mainspring_registry/agent.schema.json").read_bytes())
EXAMPLE = (ROOT / "examples/lookup/agent.yaml").read_bytes()

# A specification is whatever JSON it is: Any.
Spec = dict[str, Any]


def spec(**changes: object) -> Spec:
    """The smallest right one, changed."""
    return {
        "apiVersion": "mainspring/v1",
        "kind": "Agent",
        "name": "small",
        "model": {"provider": "scripted", "script": [{"result": 1}]},
        **changes,
    }


def scripted(*steps: object, **changes: object) -> Spec:
    return spec(model={"provider": "scripted", "script": list(steps)}, **changes)


def real(**fields: object) -> Spec:
    return spec(model={"provider": "openai", "name": "m", **fields})


def faults(document: Spec | bytes) -> dict[str, str]:
    """Field to description of the SPEC_INVALID that the document gets."""
    with pytest.raises(MainspringError) as raised:
        read_agent(document if isinstance(document, bytes) else json.dumps(document).encode(), SCHEMA)
    assert raised.value.reason_name == "SPEC_INVALID"
    assert raised.value.metadata == {"field": raised.value.violations[0].field}
    return {violation.field: violation.description for violation in raised.value.violations}


def schema_parts(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for inner in node.values():
            yield from schema_parts(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from schema_parts(inner)


def test_the_example_becomes_an_agent() -> None:
    agent = read_agent(EXAMPLE, SCHEMA)
    assert (agent.name, agent.version, agent.description) == ("lookup", "", "Answers a question with one look-up.")
    assert dict(agent.labels) == {"team": "demo"}
    assert list(agent.capabilities) == ["lookup"]
    assert json.loads(agent.spec) == yaml.safe_load(EXAMPLE)


def documented() -> list[tuple[str, bytes]]:
    """Every agent in examples/ and on the pages, with where it stands."""
    found = [(path.as_posix(), path.read_bytes()) for path in sorted((ROOT / "examples").rglob("*.yaml"))]
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        found += [(page.as_posix(), block.encode()) for block in blocks if "kind: Agent" in block]
    return found


def test_every_agent_that_is_shown_somewhere_is_right() -> None:
    shown = documented()
    assert len(shown) >= 5
    for where, document in shown:
        assert read_agent(document, SCHEMA).name, where


def test_the_reference_shows_the_example_itself() -> None:
    (block,) = [text for where, text in documented() if where.endswith("specs.md")]
    assert read_agent(block, SCHEMA) == read_agent(EXAMPLE, SCHEMA)


def test_the_same_specification_is_the_same_bytes_in_any_writing() -> None:
    as_json = json.dumps(dict(reversed(yaml.safe_load(EXAMPLE).items())), indent=3).encode()
    assert read_agent(as_json, SCHEMA) == read_agent(EXAMPLE, SCHEMA)


def test_the_schema_is_one_and_describes_every_field() -> None:
    Draft202012Validator.check_schema(SCHEMA.schema)
    for part in schema_parts(SCHEMA.schema):
        for name, field in part.get("properties", {}).items():
            # Fields within an `if` only refer to ones described elsewhere.
            assert "description" in field or set(field) <= {"const", "enum"}, f"{name} has no description"


@pytest.mark.parametrize(
    "document",
    [
        spec(),
        spec(name="a"),
        spec(name="a" * 63, labels={"app.test/part-of": ""}, instructions="", output_schema={}),
        spec(model={"provider": "openai", "name": "any-model"}, tools=["a.b_c-d", "e2"]),
        spec(model={"provider": "anthropic", "name": "any-model"}),
        scripted({"text": "Hm."}, {"text": "Still.", "delay": "1.5s", "deltas": 20}, {"result": None}),
        scripted({"fail": {"code": "UNAVAILABLE", "message": "down", "times": 2}, "result": {}}),
        scripted({"calls": [{"tool": "t", "arguments": "{{input}}"}, {"tool": "t"}]}, {"result": 1}, tools=["t"]),
        spec(limits={"timeout": "24h", "max_steps": 1, "max_concurrent_per_user": 1000}),
        spec(limits={"step_timeout": "30s", "retries": 0}, tools=["t"], tool_timeouts={"t": "5s"}),
        spec(model={"provider": "openai", "name": "any-model", "timeout": "20s"}),
        spec(tools=["a.b", {"agent": "helper"}, {"agent": "c-2", "on_failure": "fail_fast"}], handoffs=["expert"]),
        scripted(
            {"calls": [{"tool": "agent.helper"}, {"tool": "handoff.expert"}]},
            {"result": 1},
            tools=[{"agent": "helper"}],
            handoffs=["expert"],
        ),
        spec(
            model={
                "provider": "openai",
                "name": "any-model",
                "base_url": "http://models.internal:8000/v1",
                "credential": "team_a-key",
                "temperature": 0.5,
                "max_tokens": 1,
                "structured": True,
                "options": {"reasoning_effort": "low"},
                "context": {"max_tokens": 8000, "keep_last": 2},
                "fallbacks": [{"provider": "anthropic", "name": "other", "max_tokens": 100}],
            }
        ),
        spec(
            errors={
                "timeout": {"attempts": 5, "backoff": {"initial": "1s", "max": "1m", "multiplier": 1.5}},
                "internal": {},
                "invalid": {"attempts": 1},
                "permission": {"attempts": 1},
            }
        ),
    ],
)
def test_right_specifications_are_taken(document: Spec) -> None:
    assert json.loads(read_agent(json.dumps(document).encode(), SCHEMA).spec) == document


@pytest.mark.parametrize(
    ("document", "field", "description"),
    [
        (b"", "", "is empty"),
        (b"just words", "", "must be an object, not text"),
        (b"a: [", "", "line 2, column 1: is neither YAML nor JSON: did not find expected node content"),
        (spec(apiVersion="mainspring/v2"), "apiVersion", "must be mainspring/v1, not 'mainspring/v2'"),
        (spec(kind="Tool"), "kind", "must be Agent, not 'Tool'"),
        (spec(name="Big"), "name", "'Big' is not 1 to 63 lower-case letters"),
        (spec(name="a" * 64), "name", "is not 1 to 63 lower-case letters"),
        (spec(name="trailing-"), "name", "not ending with a dash"),
        (spec(name="line\n"), "name", "is not 1 to 63 lower-case letters"),
        (spec(name=""), "name", "is not 1 to 63 lower-case letters"),
        (spec(descriptoin="x"), "descriptoin", "is not known here; known are apiVersion, capabilities"),
        (spec(labels={"team": 1}), "labels.team", "must be text, not an integer"),
        (spec(labels={" ": "x"}), "labels", "is not 1 to 63 letters"),
        (spec(labels={f"l{n}": "" for n in range(17)}), "labels", "has more than 16 entries"),
        (spec(capabilities=["a", "a"]), "capabilities", "holds an entry twice"),
        (spec(tools=["Bad"]), "tools[0]", "is not lower-case words"),
        (spec(tools=["a" * 129]), "tools[0]", "is not lower-case words"),
        (spec(tools=[f"t{n}" for n in range(129)]), "tools", "has more than 128 entries"),
        (spec(model={"provider": "other"}), "model.provider", "must be one of scripted, openai, anthropic"),
        (spec(model={"provider": "scripted"}), "model.script", "is required"),
        (spec(model={"provider": "openai"}), "model.name", "is required"),
        (
            spec(model={"provider": "openai", "name": "m", "script": [{"result": 1}]}),
            "model.script",
            "is for the provider scripted only",
        ),
        (scripted(), "model.script", "has fewer than 1 entries"),
        (scripted({}), "model.script[0]", "has fewer than 1 entries"),
        (scripted({"calls": []}), "model.script[0].calls", "has fewer than 1 entries"),
        (scripted({"calls": [{}]}), "model.script[0].calls[0].tool", "is required"),
        (scripted({"calls": [{"tool": "a.b"}]}), "model.script[0].calls[0].tool", "a.b is not in `tools`: add it"),
        (
            scripted({"calls": [{"tool": "t", "arguments": []}]}),
            "model.script[0].calls[0].arguments",
            "must be an object",
        ),
        (
            scripted({"calls": [{"tool": "t", "arguments": "{{a}} {{b}}"}]}, tools=["t"]),
            "model.script[0].calls[0].arguments",
            "one template for an object",
        ),
        (scripted({"calls": [{"tool": "t"}], "result": 1}, tools=["t"]), "model.script[0]", "has calls and a result"),
        (scripted({"delay": "soon"}), "model.script[0].delay", "is not a duration such as 100ms"),
        (scripted({"delay": "100"}), "model.script[0].delay", "is not a duration such as 100ms"),
        (scripted({"delay": "2h"}), "model.script[0].delay", "is longer than 3600 s"),
        (scripted({"deltas": -1}), "model.script[0].deltas", "less than the minimum of 0"),
        (scripted({"fail": {}}), "model.script[0].fail.code", "is required"),
        (scripted({"fail": {"code": "OK"}}), "model.script[0].fail.code", "must be one of CANCELLED"),
        (spec(limits={"timeout": "0s"}), "limits.timeout", "must be more than 0 and at most 86400 s"),
        (spec(limits={"timeout": "25h"}), "limits.timeout", "must be more than 0 and at most 86400 s"),
        (spec(limits={"step_timeout": "0s"}), "limits.step_timeout", "must be more than 0 and at most 86400 s"),
        (spec(tools=["t"], tool_timeouts={"t": "0ms"}), "tool_timeouts.t", "must be more than 0 and at most 86400 s"),
        (spec(tool_timeouts={"t": "5s"}), "tool_timeouts.t", "t is not in `tools`: add it"),
        (real(base_url="ftp://a"), "model.base_url", "is not an http or https address"),
        (real(base_url="https://a?key=1"), "model.base_url", "without user and question mark"),
        (real(base_url="https://me:secret@a"), "model.base_url", "is not an http or https address"),
        (real(credential="../other"), "model.credential", "is not a name: 1 to 63 lower-case letters"),
        (real(credential=""), "model.credential", "is not a name: 1 to 63 lower-case letters"),
        (real(api_key="sk-1"), "model.api_key", "is not known here; known are base_url, context, credential"),
        (real(temperature=3), "model.temperature", "greater than the maximum of 2"),
        (real(max_tokens=0), "model.max_tokens", "less than the minimum of 1"),
        (real(context={}), "model.context.max_tokens", "is required"),
        (
            real(fallbacks=[{"provider": "scripted", "name": "m"}]),
            "model.fallbacks[0].provider",
            "must be one of openai",
        ),
        (real(fallbacks=[{"provider": "openai"}]), "model.fallbacks[0].name", "is required"),
        (
            spec(model={"provider": "openai", "name": "m", "timeout": "0s"}),
            "model.timeout",
            "must be more than 0 and at most 86400 s",
        ),
        (spec(errors={"invalid": {"attempts": 2}}), "errors.invalid.attempts", "must be 1: it fails in the same way"),
        (spec(errors={"permission": {"attempts": 9}}), "errors.permission.attempts", "must be 1: it fails in the same"),
        (spec(errors={"timeout": {"attempts": 0}}), "errors.timeout.attempts", "less than the minimum of 1"),
        (spec(errors={"bad luck": {}}), "errors.bad luck", "is not known here; known are exhausted, internal"),
        (
            spec(errors={"timeout": {"backoff": {"multiplier": 0.5}}}),
            "errors.timeout.backoff.multiplier",
            "less than the minimum of 1",
        ),
        (spec(limits={"retries": -1}), "limits.retries", "less than the minimum of 0"),
        (spec(tools=[{"agent": "helper", "on_failure": "ignore"}]), "tools[0].on_failure", "must be one of"),
        (spec(tools=[{"name": "helper"}]), "tools[0].name", "is not known here"),
        (spec(tools=["agent.helper", {"agent": "helper"}]), "tools[1]", "agent.helper is there twice"),
        (spec(tools=["handoff.expert"], handoffs=["expert"]), "tools[0]", "handoff.expert is there twice"),
        (spec(handoffs=["Expert"]), "handoffs[0]", ""),
        (
            scripted({"calls": [{"tool": "handoff.expert"}]}, {"result": 1}, tools=[]),
            "model.script[0].calls[0].tool",
            "is not in `tools`",
        ),
        (spec(limits={"max_steps": 0}), "limits.max_steps", "less than the minimum of 1"),
        (spec(limits={"max_steps": True}), "limits.max_steps", "must be an integer, not true or false"),
        (spec(output_schema=True), "output_schema", "must be an object, not true or false"),
        (spec(output_schema={"type": "objekt"}), "output_schema.type", "is no JSON Schema"),
        (spec(output_schema={"$ref": "https://elsewhere.test"}), "output_schema.$ref", "must point into this schema"),
        (spec(output_schema={"items": {"pattern": "(a)\\1"}}), "output_schema.items.pattern", "backreferences"),
        (spec(output_schema={"patternProperties": {"(?=a)": {}}}), "output_schema.pattern", "look-around"),
        (
            spec(output_schema={"allOf": [{"unevaluatedProperties": False}]}),
            "output_schema.allOf[0].unevaluatedProperties",
            "is not taken",
        ),
    ],
)
def test_wrong_specifications_are_refused_with_the_path(document: Spec | bytes, field: str, description: str) -> None:
    found = faults(document)
    assert description in found.get(field, f"no fault at {field!r}, but {found}")


def test_all_faults_are_told_at_once() -> None:
    document = spec(name="Big", kind="Bot", tools=[1], limits={"max_steps": 0}, output_schema={"type": 5}, more=1)
    assert sorted(faults(document)) == ["kind", "limits.max_steps", "more", "name", "output_schema.type", "tools[0]"]


def test_a_specification_that_grows_as_json_is_bounded_too() -> None:
    script = [{"text": "é" * 65_536} for _ in range(3)]
    assert f"at most {SPEC_BYTES_MAX} are taken" in faults(scripted(*script))[""]


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"max_concurrent": 0}, "limits.max_concurrent"),
        ({"max_concurrent_per_user": 1_000_001}, "limits.max_concurrent_per_user"),
        ({"priority": 101}, "limits.priority"),
        ({"priority": -101}, "limits.priority"),
        ({"priority": 0.5}, "limits.priority"),
    ],
)
def test_caps_and_priorities_have_bounds(limits: dict[str, object], field: str) -> None:
    assert field in faults(spec(limits=limits))
    read_agent(
        json.dumps(spec(limits={"max_concurrent": 1, "max_concurrent_per_user": 5, "priority": -100})).encode(), SCHEMA
    )
