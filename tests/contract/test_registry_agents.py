"""Agents over the wire: registered, versioned, found, resolved; and never those of another tenant."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import grpc
import pytest
from mainspring.v1 import registry_pb2 as pb
from mainspring_kit.identity import UserExecutionContext

from test_framework.grpc_testing import error_of, violations_of
from test_framework.identities import Identities, unique
from tests.contract.registry_calls import TIMEOUT, agent, until_blocked

pytestmark = pytest.mark.contract
grpc_service = "Registry"


class Tenant:
    """A tenant of a test's own, and calls as its users. Any: generated stubs have no common base."""

    def __init__(self, stub: Any, identities: Identities) -> None:
        self.tenant_id = unique("tenant")
        self._stub = stub
        self._identities = identities

    def call(self, method: str, request: object, *, role: str = "operator") -> Any:
        """The answer of a call as a user of the tenant."""
        metadata = self._identities.metadata(self.tenant_id, "ann", role)
        return getattr(self._stub, method)(request, metadata=metadata, timeout=TIMEOUT)

    def refused(self, method: str, request: object, *, role: str = "operator") -> grpc.RpcError:
        """The error of a call as a user of the tenant."""
        with pytest.raises(grpc.RpcError) as raised:
            self.call(method, request, role=role)
        return raised.value


@pytest.fixture
def tenant(grpc_stub: Any, identities: Identities) -> Tenant:
    """A tenant without agents."""
    return Tenant(grpc_stub, identities)


@pytest.fixture
def stranger(grpc_stub: Any, identities: Identities) -> Tenant:
    """Another tenant."""
    return Tenant(grpc_stub, identities)


def names(response: pb.ListAgentsResponse) -> list[str]:
    return [found.name for found in response.agents]


def test_an_agent_is_registered_and_read_back(tenant: Tenant) -> None:
    request = agent("lookup", description="Looks up.", labels={"team": "demo"}, capabilities=["search", "find"])
    registered = tenant.call("RegisterAgent", request)
    assert registered.created
    assert (registered.agent.name, registered.agent.version) == ("lookup", "1")
    assert registered.agent.description == "Looks up."
    assert dict(registered.agent.labels) == {"team": "demo"}
    assert list(registered.agent.capabilities) == ["search", "find"]
    assert json.loads(registered.agent.spec) == json.loads(request.document)
    assert registered.agent.create_time.seconds > 1_700_000_000
    read = tenant.call("GetAgent", pb.GetAgentRequest(name="lookup"), role="viewer")
    assert read.agent == registered.agent


def test_yaml_is_taken_as_well(tenant: Tenant) -> None:
    document = b"apiVersion: mainspring/v1\nkind: Agent\nname: yams\nmodel: {provider: openai, name: some-model}\n"
    registered = tenant.call("RegisterAgent", pb.RegisterAgentRequest(document=document))
    assert json.loads(registered.agent.spec)["model"] == {"provider": "openai", "name": "some-model"}


def test_the_same_specification_is_the_same_version(tenant: Tenant) -> None:
    first = tenant.call("RegisterAgent", agent("lookup", description="One."))
    again = tenant.call("RegisterAgent", agent("lookup", description="One."))
    assert (again.created, again.agent) == (False, first.agent)


def test_versions_count_from_one_and_stay_as_they_are(tenant: Tenant) -> None:
    texts = ["One.", "Two.", "One."]
    for text in texts:
        assert tenant.call("RegisterAgent", agent("lookup", description=text)).created
    for number, text in enumerate(texts, start=1):
        read = tenant.call("GetAgent", pb.GetAgentRequest(name="lookup", version=str(number)))
        assert (read.agent.version, read.agent.description) == (str(number), text)
    assert tenant.call("GetAgent", pb.GetAgentRequest(name="lookup")).agent.version == "3"
    assert tenant.call("RegisterAgent", agent("other")).agent.version == "1"


def test_versions_have_no_gap_and_no_double_under_concurrent_registrations(tenant: Tenant) -> None:
    requests = [agent("lookup", description=f"Text {number % 8}.") for number in range(32)]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda request: tenant.call("RegisterAgent", request), requests))
    created = sorted(int(answer.agent.version) for answer in answers if answer.created)
    assert created == list(range(1, len(created) + 1))
    assert len(created) >= 8
    listed = tenant.call("ListVersions", pb.ListVersionsRequest(name="lookup", page_size=100)).agents
    assert [int(found.version) for found in listed] == created[::-1]
    assert all(newer.spec != older.spec for newer, older in itertools.pairwise(listed)), (
        "a version repeats the one before it"
    )


def test_a_wrong_specification_is_refused_with_every_fault(tenant: Tenant) -> None:
    request = agent("Lookup", model={"provider": "scripted", "script": [{"result": 1, "dealy": "1s"}]}, limits=[])
    error = tenant.refused("RegisterAgent", request)
    assert error_of(error)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID")
    assert sorted(violations_of(error)) == ["limits", "model.script[0].dealy", "name"]
    assert names(tenant.call("ListAgents", pb.ListAgentsRequest())) == []


@pytest.mark.parametrize("document", [b"", b"x" * 262_145])
def test_a_document_out_of_bounds_is_refused(tenant: Tenant, document: bytes) -> None:
    error = tenant.refused("RegisterAgent", pb.RegisterAgentRequest(document=document))
    assert error_of(error)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert list(violations_of(error)) == ["document"]


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("GetAgent", pb.GetAgentRequest(name="lookup")),
        ("GetAgent", pb.GetAgentRequest(name="lookup", version="1")),
        ("ResolveAgent", pb.ResolveAgentRequest(name="lookup")),
        ("ListVersions", pb.ListVersionsRequest(name="lookup")),
        ("GetAgent", pb.GetAgentRequest(name="Not A Name\x00")),
        ("ListVersions", pb.ListVersionsRequest(name="Not A Name\x00")),
    ],
)
def test_an_unknown_agent_is_not_found(tenant: Tenant, method: str, request_: Any) -> None:
    error = error_of(tenant.refused(method, request_))
    assert error == (grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND", {"agent": request_.name})


@pytest.mark.parametrize(
    ("method", "request_", "version"),
    [
        ("GetAgent", pb.GetAgentRequest(name="lookup", version="2"), "2"),
        ("GetAgent", pb.GetAgentRequest(name="lookup", version="newest"), "newest"),
        ("ResolveAgent", pb.ResolveAgentRequest(name="lookup", version="99999999999999999999"), "9" * 20),
        ("ResolveAgent", pb.ResolveAgentRequest(name="lookup", alias="canary"), "canary"),
    ],
)
def test_an_unknown_version_or_alias_is_not_found(tenant: Tenant, method: str, request_: Any, version: str) -> None:
    tenant.call("RegisterAgent", agent("lookup"))
    error = error_of(tenant.refused(method, request_))

    assert error == (grpc.StatusCode.NOT_FOUND, "VERSION_NOT_FOUND", {"agent": "lookup", "version": version})


@pytest.mark.parametrize(("alias", "version", "expected"), [("", "", "2"), ("stable", "", "2"), ("canary", "1", "1")])
def test_stable_is_the_newest_and_a_version_wins(tenant: Tenant, alias: str, version: str, expected: str) -> None:
    tenant.call("RegisterAgent", agent("lookup", description="One."))
    tenant.call("RegisterAgent", agent("lookup", description="Two."))
    request = pb.ResolveAgentRequest(name="lookup", alias=alias, version=version)
    assert tenant.call("ResolveAgent", request, role="viewer").agent.version == expected


def test_agents_are_found_by_label_capability_and_text(tenant: Tenant) -> None:
    tenant.call("RegisterAgent", agent("alpha", labels={"team": "a", "stage": "live"}, capabilities=["search"]))
    tenant.call("RegisterAgent", agent("beta", labels={"team": "b", "stage": "live"}, description="Adds 100% FAST."))
    tenant.call("RegisterAgent", agent("gamma", capabilities=["search", "add"], description="Was old."))
    tenant.call("RegisterAgent", agent("gamma", capabilities=["add"], description="Is new."))
    expected: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["alpha", "beta", "gamma"]),
        ({"labels": {"stage": "live"}}, ["alpha", "beta"]),
        ({"labels": {"stage": "live", "team": "b"}}, ["beta"]),
        ({"labels": {"stage": ""}}, []),
        ({"capability": "search"}, ["alpha"]),
        ({"capability": "sear"}, []),
        ({"text": "fast"}, ["beta"]),
        ({"text": "0% f"}, ["beta"]),
        ({"text": "AMM"}, ["gamma"]),
        ({"text": "old"}, []),
        ({"text": "a", "capability": "add"}, ["gamma"]),
    ]
    for filters, found in expected:
        assert names(tenant.call("ListAgents", pb.ListAgentsRequest(**filters), role="viewer")) == found, filters


def test_pages_hold_every_agent_once_and_in_order(tenant: Tenant) -> None:
    everything = [f"agent-{number:02}" for number in range(7)]
    for name in reversed(everything):
        tenant.call("RegisterAgent", agent(name))
    found, token = [], ""
    for size in (3, 3, 1):
        page = tenant.call("ListAgents", pb.ListAgentsRequest(page_size=3, page_token=token))
        assert len(page.agents) == size
        found += names(page)
        token = page.next_page_token
    assert (found, token) == (everything, "")


def test_pages_of_versions_go_back_to_the_first(tenant: Tenant) -> None:
    for number in range(5):
        tenant.call("RegisterAgent", agent("lookup", description=f"{number}"))
    first = tenant.call("ListVersions", pb.ListVersionsRequest(name="lookup", page_size=3))
    request = pb.ListVersionsRequest(name="lookup", page_size=3, page_token=first.next_page_token)
    second = tenant.call("ListVersions", request)
    assert [found.version for found in [*first.agents, *second.agents]] == ["5", "4", "3", "2", "1"]
    assert second.next_page_token == ""


def test_a_page_is_bounded_in_bytes_too(tenant: Tenant) -> None:
    for number in range(12):
        tenant.call(
            "RegisterAgent",
            agent(f"large-{number:02}", instructions="x" * 65_000, output_schema={"description": "y" * 180_000}),
        )
    found, token, pages = [], "", 0
    while token or not pages:
        page = tenant.call("ListAgents", pb.ListAgentsRequest(page_size=500, page_token=token))
        assert page.ByteSize() < 3 << 20
        found += names(page)
        token, pages = page.next_page_token, pages + 1
    assert found == [f"large-{number:02}" for number in range(12)]
    assert pages == 2


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("ListAgents", pb.ListAgentsRequest(page_size=501), "page_size"),
        ("ListAgents", pb.ListAgentsRequest(page_size=-1), "page_size"),
        ("ListAgents", pb.ListAgentsRequest(page_token="!"), "page_token"),
        ("ListAgents", pb.ListAgentsRequest(text="\x00"), "text"),
        ("ListVersions", pb.ListVersionsRequest(name="lookup", page_token="bG9va3Vw"), "page_token"),
        ("GetAgent", pb.GetAgentRequest(), "name"),
        ("ResolveAgent", pb.ResolveAgentRequest(), "name"),
        ("ListVersions", pb.ListVersionsRequest(), "name"),
    ],
)
def test_a_malformed_request_is_refused(tenant: Tenant, method: str, request_: object, field: str) -> None:
    error = tenant.refused(method, request_)
    assert error_of(error)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert list(violations_of(error)) == [field]


def test_another_tenant_sees_nothing(tenant: Tenant, stranger: Tenant) -> None:
    tenant.call("RegisterAgent", agent("lookup", description="Secret."))
    for method, request in [
        ("GetAgent", pb.GetAgentRequest(name="lookup")),
        ("GetAgent", pb.GetAgentRequest(name="lookup", version="1")),
        ("ResolveAgent", pb.ResolveAgentRequest(name="lookup")),
        ("ListVersions", pb.ListVersionsRequest(name="lookup")),
    ]:
        assert error_of(stranger.refused(method, request)).reason == "AGENT_NOT_FOUND"
    assert names(stranger.call("ListAgents", pb.ListAgentsRequest())) == []
    mine = stranger.call("RegisterAgent", agent("lookup", description="Mine."))
    assert (mine.created, mine.agent.version) == (True, "1")
    assert tenant.call("GetAgent", pb.GetAgentRequest(name="lookup")).agent.description == "Secret."


@pytest.mark.parametrize(
    ("method", "request_", "role"),
    [("RegisterAgent", agent("lookup"), "runner"), ("WatchCatalog", pb.WatchCatalogRequest(), "admin")],
)
def test_a_role_that_does_not_cover_the_call_is_refused(
    tenant: Tenant, method: str, request_: object, role: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(tenant.call(method, request_, role=role))
    assert error_of(raised.value)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")


def test_nobody_calls_without_a_token(grpc_stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        grpc_stub.ListAgents(pb.ListAgentsRequest(), timeout=TIMEOUT)
    assert error_of(raised.value)[:2] == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


def test_a_service_acts_for_the_user_in_its_context_and_for_nobody_else(
    grpc_stub: Any, identities: Identities, tenant: Tenant
) -> None:
    tenant.call("RegisterAgent", agent("lookup"))
    context = UserExecutionContext(tenant_id=tenant.tenant_id, user_id="ann")
    request = pb.GetAgentRequest(name="lookup")
    read = grpc_stub.GetAgent(request, metadata=identities.service_metadata(context), timeout=TIMEOUT)
    assert read.agent.version == "1"
    with pytest.raises(grpc.RpcError) as raised:
        grpc_stub.GetAgent(request, metadata=identities.service_metadata(), timeout=TIMEOUT)
    assert error_of(raised.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_INVALID")


def test_an_rpc_of_a_later_release_says_so(tenant: Tenant) -> None:
    error = error_of(tenant.refused("SetAlias", pb.SetAliasRequest()))
    assert error[:2] == (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")


@pytest.mark.parametrize("ending", ["deadline", "cancel"])
async def test_a_registration_that_is_given_up_leaves_nothing(
    aio_stub: Any, identities: Identities, contract_environment: dict[str, Any], ending: str
) -> None:
    metadata = identities.metadata(unique("tenant"), "ann", "operator")
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    try:
        async with owner.transaction():
            await owner.execute("SELECT revision FROM registry.clock FOR UPDATE")
            call = aio_stub.RegisterAgent(
                agent("lookup"), metadata=metadata, timeout=0.5 if ending == "deadline" else TIMEOUT
            )
            await until_blocked(owner)
            if ending == "cancel":
                call.cancel()
            code = await call.code()
            assert code is (grpc.StatusCode.CANCELLED if ending == "cancel" else grpc.StatusCode.DEADLINE_EXCEEDED)
    finally:
        await owner.close()
    listed = await aio_stub.ListAgents(pb.ListAgentsRequest(), metadata=metadata, timeout=TIMEOUT)
    assert names(listed) == []
    registered = await aio_stub.RegisterAgent(agent("lookup"), metadata=metadata, timeout=TIMEOUT)
    assert (registered.created, registered.agent.version) == (True, "1")


@pytest.mark.parametrize("ending", ["deadline", "cancel"])
@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("GetAgent", pb.GetAgentRequest(name="lookup")),
        ("ResolveAgent", pb.ResolveAgentRequest(name="lookup")),
        ("ListAgents", pb.ListAgentsRequest()),
        ("ListVersions", pb.ListVersionsRequest(name="lookup")),
    ],
)
async def test_a_read_that_is_given_up_ends_at_once(
    aio_stub: Any,
    identities: Identities,
    contract_environment: dict[str, Any],
    method: str,
    request_: object,
    ending: str,
) -> None:
    metadata = identities.metadata(unique("tenant"), "ann", "operator")
    await aio_stub.RegisterAgent(agent("lookup"), metadata=metadata, timeout=TIMEOUT)
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    try:
        async with owner.transaction():
            await owner.execute("LOCK TABLE registry.agent_versions IN ACCESS EXCLUSIVE MODE")
            timeout = 0.5 if ending == "deadline" else TIMEOUT
            call = getattr(aio_stub, method)(request_, metadata=metadata, timeout=timeout)
            await until_blocked(owner)
            if ending == "cancel":
                call.cancel()
            code = await call.code()
            assert code is (grpc.StatusCode.CANCELLED if ending == "cancel" else grpc.StatusCode.DEADLINE_EXCEEDED)
    finally:
        await owner.close()
    await getattr(aio_stub, method)(request_, metadata=metadata, timeout=TIMEOUT)
