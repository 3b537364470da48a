"""A user's runs are out of every other user's reach, by socket, by HTTP, by gRPC, by SQL under the service's role."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import asyncpg
import grpc
import pytest
from mainspring.v1 import execution_pb2, state_pb2

from test_framework.agents import echo_agent
from test_framework.grpc_testing import error_of
from test_framework.identities import make_context, unique
from test_framework.rows import holds
from test_framework.stack import Stack
from test_framework.user import User

pytestmark = [pytest.mark.flow, pytest.mark.security, pytest.mark.real_services]

CALL_SECONDS = 10


class Scene(NamedTuple):
    """One user with a finished run, and a stranger who knows the run's id."""

    owner: User
    stranger: User
    run_id: str
    secret: str


@pytest.fixture(params=["same tenant", "other tenant"])
async def scene(request: pytest.FixtureRequest, real_services_fixture: Stack) -> AsyncIterator[Scene]:
    """The stranger is a colleague, or somebody from elsewhere; with the same session id as the owner either way."""
    owner = User(real_services_fixture, make_context())
    tenant_id = owner.context.tenant_id if request.param == "same tenant" else unique("tenant")
    stranger = User(real_services_fixture, make_context(tenant_id, session_id=owner.context.session_id))
    secret = unique("secret")
    await owner.register(echo_agent())
    async with owner.stream() as socket:
        events = await socket.run("echo", {"value": secret}, session_id=owner.context.session_id)
    yield Scene(owner, stranger, events[0]["run_id"], secret)
    await owner.close()
    await stranger.close()


async def test_a_socket_shows_a_stranger_nothing(scene: Scene) -> None:
    async with scene.stranger.stream() as socket:
        asked = {"signal": {"name": "go"}}
        for op in ("follow", "cancel", "pause", "resume", "retry", "signal"):
            answer = await socket.ask(op, run_id=scene.run_id, **asked.get(op, {}))
            assert (answer["op"], answer["code"], answer["reason"]) == ("error", "NOT_FOUND", "RUN_NOT_FOUND")
        await socket.ask("ping")
        assert socket.events() == []
        assert scene.secret not in repr(socket.frames)


async def test_http_shows_a_stranger_nothing(scene: Scene) -> None:
    bodies = {":signal": {"name": "go"}, ":fork": {"seq": 1}}
    paths = [("GET", ""), ("GET", "/events"), ("GET", ":explain"), ("POST", ":cancel"), ("POST", ":pause")]
    paths += [("POST", verb) for verb in (":resume", ":retry", ":signal", ":fork")]
    for method, path in paths:
        answer = await scene.stranger.http(method, f"/v1/runs/{scene.run_id}{path}", bodies.get(path))
        assert (answer.status, answer.json["reason"]) == (404, "RUN_NOT_FOUND"), path
    for path in ("/v1/runs", f"/v1/runs?session_id={scene.owner.context.session_id}", "/v1/sessions"):
        answer = await scene.stranger.http("GET", path)
        assert answer.status == 200
        assert scene.run_id.encode() not in answer.body and scene.secret.encode() not in answer.body

    listed = await scene.owner.http("GET", "/v1/runs")
    assert scene.run_id.encode() in listed.body


async def test_grpc_shows_a_stranger_nothing(scene: Scene) -> None:
    state, execution = await scene.stranger.grpc_stub("State"), await scene.stranger.grpc_stub("Execution")
    metadata = scene.stranger.metadata()
    calls = [
        (state.GetRun, state_pb2.GetRunRequest(run_id=scene.run_id)),
        (state.ReadEvents, state_pb2.ReadEventsRequest(run_id=scene.run_id)),
        (state.WaitRun, state_pb2.WaitRunRequest(run_id=scene.run_id)),
        (execution.CancelRun, execution_pb2.CancelRunRequest(run_id=scene.run_id)),
    ]
    for method, request in calls:
        with pytest.raises(grpc.RpcError) as raised:
            await method(request, metadata=metadata, timeout=CALL_SECONDS)
        error = error_of(raised.value)
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"), request

    listed = await state.ListRuns(state_pb2.ListRunsRequest(), metadata=metadata, timeout=CALL_SECONDS)
    assert list(listed.runs) == []
    follow = state.Follow(metadata=metadata, timeout=CALL_SECONDS)
    await follow.write(state_pb2.FollowRequest(subscribe=[state_pb2.Subscribe(subscription_id=1, run_id=scene.run_id)]))
    async with asyncio.timeout(CALL_SECONDS):
        deliveries = await _first_deliveries(follow)
    follow.cancel()
    assert [(item.subscription_id, item.status.code, len(item.events)) for item in deliveries] == [
        (1, grpc.StatusCode.NOT_FOUND.value[0], 0)
    ]

    own = await (await scene.owner.grpc_stub("State")).GetRun(
        state_pb2.GetRunRequest(run_id=scene.run_id), metadata=scene.owner.metadata(), timeout=CALL_SECONDS
    )
    assert own.run.run_id == scene.run_id


async def test_sql_under_the_services_role_shows_a_stranger_nothing(scene: Scene) -> None:
    rows = scene.owner.stack.rows
    tables = await rows.as_owner(
        "SELECT c.oid::regclass::text AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'state' AND c.relkind IN ('r', 'p')"
    )
    own: dict[str, bool] = {}
    for table in (row["name"] for row in tables):
        statement = f"SELECT * FROM {table}"
        try:
            own[table] = holds(await rows.as_service("state", scene.owner.context, statement), scene.run_id)
        except asyncpg.InsufficientPrivilegeError:
            continue
        for context in (scene.stranger.context, None):
            found = await rows.as_service("state", context, statement)
            assert not holds(found, scene.run_id) and not holds(found, scene.secret), table

    # The owner sees the rows by the very same statements.
    assert own["state.runs"] and own["state.events"], own


# Any: the generated call is generic over what it carries.
async def _first_deliveries(follow: Any) -> list[state_pb2.Delivery]:
    while True:
        frame = await follow.read()
        assert frame is not grpc.aio.EOF, "the stream ended without an answer"
        if frame.deliveries:
            return list(frame.deliveries)
