"""Tools over the wire: registered all or none, updated, listed; shared ones beside a tenant's own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from mainspring.v1 import registry_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_kit.identity import UserExecutionContext

from test_framework.grpc_testing import error_of, violations_of
from test_framework.identities import Identities, Metadata, unique
from tests.contract.registry_calls import TIMEOUT, tool, until_blocked

pytestmark = pytest.mark.contract
grpc_service = "Registry"


@pytest.fixture
def operator(identities: Identities) -> Metadata:
    """An operator of a tenant of the test's own."""
    return identities.metadata(unique("tenant"), "ann", "operator")


@pytest.fixture
def stranger(identities: Identities) -> Metadata:
    """An operator of another tenant."""
    return identities.metadata(unique("tenant"), "ann", "operator")


# Any below: generated stubs have no common base.
def register(stub: Any, metadata: Metadata, *tools: types_pb2.Tool) -> list[types_pb2.Tool]:
    request = pb.RegisterToolsRequest(tools=tools)
    return list(stub.RegisterTools(request, metadata=metadata, timeout=TIMEOUT).tools)


def refused(stub: Any, metadata: Metadata, *tools: types_pb2.Tool) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        register(stub, metadata, *tools)
    return raised.value


def listed(stub: Any, metadata: Metadata, prefix: str = "") -> list[types_pb2.Tool]:
    """All tools that the caller may call whose names have the prefix, gathered page by page."""
    found, token = [], ""
    while True:
        request = pb.ListToolsRequest(page_size=3, page_token=token)
        page = stub.ListTools(request, metadata=metadata, timeout=TIMEOUT)
        assert len(page.tools) <= 3
        found += page.tools
        token = page.next_page_token
        if not token:
            return [each for each in found if each.name.startswith(prefix)]


def revision(stub: Any, identities: Identities) -> int:
    """The catalog's newest, as a watcher is told."""
    request = pb.WatchCatalogRequest(after_revision=1)
    stream = stub.WatchCatalog(request, metadata=identities.service_metadata(), timeout=TIMEOUT)
    newest = next(int(frame.revision) for frame in stream if not frame.agents and not frame.tools)
    stream.cancel()
    return newest


def test_tools_are_registered_in_order_and_listed_by_name(grpc_stub: Any, operator: Metadata) -> None:
    declared = types_pb2.Tool(
        name="files.read",
        description="Reads.",
        input_schema=b'{"type": "object", "properties": {"b": {}, "a": {}}}',
        effect=types_pb2.EFFECT_CLASS_KEYED,
        timeout=Duration(seconds=5, nanos=500_000_000),
    )
    stored = register(grpc_stub, operator, declared, tool("b"), tool("a"))
    assert [each.name for each in stored] == ["files.read", "b", "a"]
    expected = types_pb2.Tool()
    expected.CopyFrom(declared)
    expected.version = stored[0].version
    assert stored[0] == expected
    assert len(stored[0].version) == 12
    assert not stored[1].HasField("timeout")
    found = {each.name: each for each in listed(grpc_stub, operator)}
    assert [found[name] for name in ("files.read", "b", "a")] == stored


def test_the_same_declaration_is_the_same_version_and_another_takes_its_place(
    grpc_stub: Any, operator: Metadata
) -> None:
    (first,) = register(grpc_stub, operator, tool("t", "One."))
    assert register(grpc_stub, operator, tool("t", "One.")) == [first]
    (second,) = register(grpc_stub, operator, tool("t", "Two."))
    assert second.version != first.version
    assert listed(grpc_stub, operator, "t") == [second]


@pytest.mark.parametrize("shared", [False, True])
def test_the_same_declarations_again_change_nothing(
    grpc_stub: Any, identities: Identities, operator: Metadata, *, shared: bool
) -> None:
    metadata = identities.service_metadata() if shared else operator
    names = [unique("same"), unique("same")]
    stored = register(grpc_stub, metadata, *map(tool, names))
    before = revision(grpc_stub, identities)
    assert register(grpc_stub, metadata, *map(tool, names)) == stored
    assert revision(grpc_stub, identities) == before


def test_another_effect_class_collides_and_nothing_is_registered(grpc_stub: Any, operator: Metadata) -> None:
    (known,) = register(grpc_stub, operator, tool("t"))
    changed = tool("t", effect=types_pb2.EFFECT_CLASS_UNSAFE)
    error = refused(grpc_stub, operator, tool("before"), changed, tool("zz"))
    assert error_of(error) == (grpc.StatusCode.ALREADY_EXISTS, "TOOL_CONFLICT", {"tool": "t"})
    assert [each for each in listed(grpc_stub, operator) if not each.shared] == [known]


def test_wrong_declarations_are_refused_with_every_fault(grpc_stub: Any, operator: Metadata) -> None:
    error = refused(grpc_stub, operator, tool("good"), types_pb2.Tool(name="Bad", input_schema=b"["), tool("good"))
    assert error_of(error)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert sorted(violations_of(error)) == [
        "tools[1].effect",
        "tools[1].input_schema",
        "tools[1].name",
        "tools[2].name",
    ]
    assert listed(grpc_stub, operator, "good") == []


@pytest.mark.parametrize("count", [0, 257])
def test_a_request_out_of_bounds_is_refused(grpc_stub: Any, operator: Metadata, count: int) -> None:
    error = refused(grpc_stub, operator, *(tool(f"t{number}") for number in range(count)))
    assert error_of(error)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")


def test_as_many_tools_as_a_request_may_have_are_registered(grpc_stub: Any, operator: Metadata) -> None:
    stored = register(grpc_stub, operator, *(tool(f"many.t{number}") for number in range(256)))
    found = listed(grpc_stub, operator, "many.")
    assert sorted(stored, key=lambda each: each.name) == found


def test_concurrent_registrations_of_the_same_tools_all_succeed(grpc_stub: Any, operator: Metadata) -> None:
    tools = [tool(f"t{number}") for number in range(20)]
    orders = [tools, tools[::-1]] * 8
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda order: register(grpc_stub, operator, *order), orders))
    assert all(sorted(each.version for each in answer) == sorted(e.version for e in answers[0]) for answer in answers)


def test_another_tenant_sees_nothing(grpc_stub: Any, operator: Metadata, stranger: Metadata) -> None:
    register(grpc_stub, operator, tool("secret", "Mine."))
    assert listed(grpc_stub, stranger, "secret") == []
    (own,) = register(grpc_stub, stranger, tool("secret", effect=types_pb2.EFFECT_CLASS_UNSAFE))
    assert own.description == ""
    assert [each.description for each in listed(grpc_stub, operator, "secret")] == ["Mine."]


def test_a_service_registers_shared_tools_that_every_tenant_may_call(
    grpc_stub: Any, identities: Identities, operator: Metadata, stranger: Metadata
) -> None:
    name = unique("shared")
    (shared,) = register(grpc_stub, identities.service_metadata(), tool(name, "For all."))
    assert shared.shared
    assert listed(grpc_stub, operator, name) == listed(grpc_stub, stranger, name) == [shared]
    assert register(grpc_stub, identities.service_metadata(), tool(name, "For all.")) == [shared]


def test_a_tenants_own_tool_hides_the_shared_one_from_it_alone(
    grpc_stub: Any, identities: Identities, operator: Metadata, stranger: Metadata
) -> None:
    name = unique("shared")
    (shared,) = register(grpc_stub, identities.service_metadata(), tool(name, "For all."))
    conflict = refused(grpc_stub, operator, tool(name, effect=types_pb2.EFFECT_CLASS_KEYED))
    assert error_of(conflict).reason == "TOOL_CONFLICT"
    (own,) = register(grpc_stub, operator, tool(name, "My own."))
    assert not own.shared
    assert listed(grpc_stub, operator, name) == [own]
    assert listed(grpc_stub, stranger, name) == [shared]


def test_a_service_registers_for_the_tenant_in_its_context(grpc_stub: Any, identities: Identities) -> None:
    context = UserExecutionContext(tenant_id=unique("tenant"), user_id="ann")
    name = unique("own")
    (stored,) = register(grpc_stub, identities.service_metadata(context), tool(name))
    assert not stored.shared
    assert listed(grpc_stub, identities.metadata(context.tenant_id, "bob", "viewer"), name) == [stored]


def test_a_role_that_does_not_cover_the_call_is_refused(grpc_stub: Any, identities: Identities) -> None:
    error = refused(grpc_stub, identities.metadata(unique("tenant"), "ann", "runner"), tool("t"))
    assert error_of(error)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")


def test_a_malformed_page_token_is_refused(grpc_stub: Any, operator: Metadata) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        grpc_stub.ListTools(pb.ListToolsRequest(page_token="!"), metadata=operator, timeout=TIMEOUT)
    assert list(violations_of(raised.value)) == ["page_token"]


def test_a_page_is_bounded_in_bytes_too(grpc_stub: Any, operator: Metadata) -> None:
    padding = b'{"description": "' + b"x" * 65_000 + b'"}'
    tools = [tool(f"large.t{number:02}") for number in range(40)]
    for each in tools:
        each.input_schema = padding
    register(grpc_stub, operator, *tools)
    request = pb.ListToolsRequest(page_size=500, page_token="bGFyZ2U")
    page = grpc_stub.ListTools(request, metadata=operator, timeout=TIMEOUT)
    assert 32 <= len(page.tools) < 40
    assert page.next_page_token
    assert page.ByteSize() < 3 << 20


@pytest.mark.parametrize("ending", ["deadline", "cancel"])
@pytest.mark.parametrize(
    ("method", "request_"),
    [("RegisterTools", pb.RegisterToolsRequest(tools=[tool("t")])), ("ListTools", pb.ListToolsRequest())],
)
async def test_a_call_that_is_given_up_ends_at_once_and_leaves_nothing(
    aio_stub: Any,
    operator: Metadata,
    contract_environment: dict[str, Any],
    method: str,
    request_: object,
    ending: str,
) -> None:
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    try:
        async with owner.transaction():
            await owner.execute("LOCK TABLE registry.tools IN ACCESS EXCLUSIVE MODE")
            timeout = 0.5 if ending == "deadline" else TIMEOUT
            call = getattr(aio_stub, method)(request_, metadata=operator, timeout=timeout)
            await until_blocked(owner)
            if ending == "cancel":
                call.cancel()
            code = await call.code()
            assert code is (grpc.StatusCode.CANCELLED if ending == "cancel" else grpc.StatusCode.DEADLINE_EXCEEDED)
    finally:
        await owner.close()
    page = await aio_stub.ListTools(pb.ListToolsRequest(page_size=500), metadata=operator, timeout=TIMEOUT)
    assert [each for each in page.tools if not each.shared] == []
