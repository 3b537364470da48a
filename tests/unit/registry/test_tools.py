"""Declarations of tools: what is taken, which version it is, and when it collides."""

import re

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError
from mainspring_registry.core.tools import changed_tools, read_tools

pytestmark = pytest.mark.unit

PURE = types_pb2.EFFECT_CLASS_PURE
KEYED = types_pb2.EFFECT_CLASS_KEYED


def tool(
    name: str = "files.read",
    *,
    description: str = "Reads a file.",
    input_schema: bytes = b'{"type": "object", "properties": {"path": {"type": "string"}}}',
    effect: int = PURE,
    timeout: Duration | None = None,
) -> types_pb2.Tool:
    return types_pb2.Tool(
        name=name,
        description=description,
        input_schema=input_schema,
        effect=effect,  # type: ignore[arg-type]  # any number can arrive
        timeout=timeout,
    )


def version(declared: types_pb2.Tool) -> str:
    return read_tools([declared], shared=False)[0].version


def test_a_declaration_gets_its_version_and_owner_and_keeps_its_bytes() -> None:
    declared = tool()
    (stored,) = read_tools([declared], shared=True)
    assert re.fullmatch(r"[0-9a-f]{12}", stored.version)
    assert stored.shared
    assert stored.input_schema == declared.input_schema
    assert not declared.version, "the request is not changed"


def test_the_caller_cannot_choose_version_or_owner() -> None:
    declared = tool()
    declared.version, declared.shared = "mine", True
    (stored,) = read_tools([declared], shared=False)
    assert (stored.version, stored.shared) == (version(tool()), False)


def test_the_version_is_the_declaration_not_its_writing() -> None:
    assert version(tool()) == version(tool(input_schema=b'{"properties":{"path":{"type":"string"}},"type":"object"}'))


@pytest.mark.parametrize(
    "other",
    [
        tool("files.write"),
        tool(description="Reads it."),
        tool(effect=KEYED),
        tool(input_schema=b"{}"),
        tool(timeout=Duration(seconds=30)),
    ],
)
def test_every_part_of_the_declaration_is_in_the_version(other: types_pb2.Tool) -> None:
    assert version(other) != version(tool())


@given(st.integers(1_000_000, 3_600 * 10**9))
def test_a_timeout_is_kept_to_the_microsecond(nanos: int) -> None:
    timeout = Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)
    (stored,) = read_tools([tool(timeout=timeout)], shared=False)
    assert stored.timeout.ToMicroseconds() == nanos // 1_000
    assert version(stored) == stored.version


@pytest.mark.parametrize(
    ("declared", "field", "description"),
    [
        (tool(""), "name", "must be lower-case words"),
        (tool("Files.read"), "name", "must be lower-case words"),
        (tool("files..read"), "name", "must be lower-case words"),
        (tool("files.read\n"), "name", "must be lower-case words"),
        (tool("a" * 129), "name", "must be lower-case words"),
        (tool("run.away"), "name", "must not begin with"),
        (tool("agent.smith"), "name", "must not begin with"),
        (tool(description="é" * 2_049), "description", "is longer than 4096 bytes"),
        (tool(description="\x00"), "description", "holds a NUL character"),
        (tool(effect=0), "effect", "must be pure, idempotent, keyed or unsafe"),
        (tool(effect=99), "effect", "must be pure, idempotent, keyed or unsafe"),
        (tool(timeout=Duration()), "timeout", "must be from 1 ms to 1 h"),
        (tool(timeout=Duration(nanos=999_999)), "timeout", "must be from 1 ms to 1 h"),
        (tool(timeout=Duration(seconds=-1)), "timeout", "must be from 1 ms to 1 h"),
        (tool(timeout=Duration(seconds=3_600, nanos=1)), "timeout", "must be from 1 ms to 1 h"),
        (tool(input_schema=b""), "input_schema", "is not JSON"),
        (tool(input_schema=b"type: object"), "input_schema", "is not JSON"),
        (tool(input_schema=b"\xff"), "input_schema", "is not UTF-8"),
        (tool(input_schema=b"[]"), "input_schema", "must be an object"),
        (tool(input_schema=b'{"type": "array"}'), "input_schema.type", "must be object"),
        (tool(input_schema=b'{"type": "objekt"}'), "input_schema.type", "is no JSON Schema"),
        (tool(input_schema=b'{"$ref": "https://elsewhere.test"}'), "input_schema.$ref", "must point into this schema"),
        (tool(input_schema=b" " * 65_537), "input_schema", "is longer than 65536 bytes"),
    ],
)
def test_wrong_declarations_are_refused_with_the_path(declared: types_pb2.Tool, field: str, description: str) -> None:
    with pytest.raises(MainspringError) as raised:
        read_tools([tool("good"), declared], shared=False)
    assert raised.value.reason_name == "REQUEST_INVALID"
    violation = raised.value.violations[0]
    assert violation.field == f"tools[1].{field}"
    assert description in violation.description


def test_all_faults_are_told_at_once_and_a_name_is_declared_once() -> None:
    with pytest.raises(MainspringError) as raised:
        read_tools([tool("a", effect=0), tool("B"), tool("a")], shared=False)
    fields = [violation.field for violation in raised.value.violations]
    assert fields == ["tools[0].effect", "tools[1].name", "tools[2].name"]


def test_only_what_differs_from_the_stored_is_written() -> None:
    same, new, other = read_tools([tool("same"), tool("new"), tool("other")], shared=False)
    (before,) = read_tools([tool("other", description="It was this.")], shared=False)
    assert changed_tools([same, new, other], {"same": same, "other": before}) == [new, other]


def test_a_tenant_gets_a_tool_of_its_own_beside_a_shared_one() -> None:
    (shared,) = read_tools([tool()], shared=True)
    (own,) = read_tools([tool()], shared=False)
    assert changed_tools([own], {own.name: shared}) == [own]


@pytest.mark.parametrize("shared", [True, False])
def test_another_effect_class_collides(*, shared: bool) -> None:
    (stored,) = read_tools([tool(effect=KEYED)], shared=shared)
    (wanted,) = read_tools([tool(effect=PURE)], shared=False)
    with pytest.raises(MainspringError, match=r"registered as keyed and cannot become pure") as raised:
        changed_tools([wanted], {stored.name: stored})
    assert raised.value.reason_name == "TOOL_CONFLICT"
    assert raised.value.metadata == {"tool": "files.read"}
