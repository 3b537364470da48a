"""Runs, logs and sessions as their users read them: good, unknown, foreign, malformed, paged, waited for."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit.identity import UserExecutionContext, new_id

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities
from tests.contract.state_calls import (
    TIMEOUT,
    Executor,
    completed,
    person,
    thinking,
)

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs and requests have no common base.


class Reader:
    """A user and calls in the user's name."""

    def __init__(self, stub: Any, identities: Identities, tenant_id: str = "") -> None:
        self.user = person(tenant_id)
        self._stub = stub
        self._identities = identities

    async def call(self, method: str, request: Any, *, role: str = "runner", timeout: float = TIMEOUT) -> Any:
        """The answer."""
        metadata = self._identities.metadata(self.user.tenant_id, self.user.user_id, role)
        return await getattr(self._stub, method)(request, metadata=metadata, timeout=timeout)

    async def refused(self, method: str, request: Any, **options: Any) -> str:
        """The reason of the refusal."""
        with pytest.raises(grpc.RpcError) as raised:
            await self.call(method, request, **options)
        return error_of(raised.value).reason


@pytest.fixture
def reader(aio_stub: Any, identities: Identities) -> Reader:
    """A user of a tenant of the test's own."""
    return Reader(aio_stub, identities)


RUN_READS = [
    ("GetRun", lambda run_id: state_pb2.GetRunRequest(run_id=run_id)),
    ("WaitRun", lambda run_id: state_pb2.WaitRunRequest(run_id=run_id)),
    ("ReadEvents", lambda run_id: state_pb2.ReadEventsRequest(run_id=run_id)),
]


@pytest.mark.parametrize(("method", "request_of"), RUN_READS)
async def test_a_run_that_is_not_the_users_own_is_not_found(
    aio_stub: Any, identities: Identities, executor: Executor, reader: Reader, method: str, request_of: Any
) -> None:
    run_id = await executor.start(reader.user)
    await reader.call("GetRun", state_pb2.GetRunRequest(run_id=run_id))
    colleague = Reader(aio_stub, identities, reader.user.tenant_id)
    stranger = Reader(aio_stub, identities)
    assert await colleague.refused(method, request_of(run_id)) == "RUN_NOT_FOUND"
    assert await stranger.refused(method, request_of(run_id)) == "RUN_NOT_FOUND"
    for unknown in (new_id(), "nonsense", "", "x" * 128, run_id + "a"):
        assert await reader.refused(method, request_of(unknown)) == "RUN_NOT_FOUND"


async def test_a_service_reads_for_the_user_that_it_names(
    aio_stub: Any, identities: Identities, executor: Executor, reader: Reader
) -> None:
    run_id = await executor.start(reader.user)
    request = state_pb2.GetRunRequest(run_id=run_id.upper())
    found = await aio_stub.GetRun(request, metadata=identities.service_metadata(reader.user), timeout=TIMEOUT)
    assert found.run.run_id == run_id
    with pytest.raises(grpc.RpcError) as raised:
        await aio_stub.GetRun(request, metadata=identities.service_metadata(), timeout=TIMEOUT)
    assert error_of(raised.value).reason == "CONTEXT_INVALID"


async def test_runs_are_listed_newest_first_in_pages(executor: Executor, reader: Reader) -> None:
    policy = {"policy": types_pb2.SESSION_POLICY_PARALLEL}
    run_ids = [await executor.start(reader.user, **policy) for _ in range(5)]
    await executor.start(person(reader.user.tenant_id))
    listed, token = [], ""
    for expected in (2, 2, 1):
        page = await reader.call("ListRuns", state_pb2.ListRunsRequest(page_size=2, page_token=token))
        assert len(page.runs) == expected
        listed += [run.run_id for run in page.runs]
        token = page.next_page_token
    assert (listed, token) == (run_ids[::-1], "")
    assert await reader.refused("ListRuns", state_pb2.ListRunsRequest(page_token="x")) == "REQUEST_INVALID"
    assert await reader.refused("ListRuns", state_pb2.ListRunsRequest(page_size=501)) == "REQUEST_INVALID"


async def test_runs_are_listed_by_session_agent_and_state(executor: Executor, reader: Reader) -> None:
    one = await executor.start(reader.user, session_id="one")
    two = await executor.start(reader.user, session_id="two", agent="other")
    await executor.go_on(reader.user, two, completed(), after=1)

    async def listed(**wanted: Any) -> list[str]:
        return [run.run_id for run in (await reader.call("ListRuns", state_pb2.ListRunsRequest(**wanted))).runs]

    assert await listed() == [two, one]
    assert await listed(session_id="one") == [one]
    assert await listed(agent="other") == [two]
    assert await listed(states=[types_pb2.RUN_STATE_RUNNING, types_pb2.RUN_STATE_QUEUED]) == [one]
    assert await listed(session_id="one", agent="other") == []
    assert await listed(states=[1 << 20]) == []


async def test_a_log_is_read_in_pages(executor: Executor, reader: Reader) -> None:
    run_id = await executor.start(reader.user)
    await executor.go_on(reader.user, run_id, *(thinking() for _ in range(6)), after=1)
    page = await reader.call("ReadEvents", state_pb2.ReadEventsRequest(run_id=run_id, after_seq=2, page_size=3))
    assert ([event.seq for event in page.events], page.last_seq) == ([3, 4, 5], 7)
    rest = await reader.call("ReadEvents", state_pb2.ReadEventsRequest(run_id=run_id, after_seq=5))
    assert [event.seq for event in rest.events] == [6, 7]
    for beyond in (99, (1 << 63) - 1):
        none = await reader.call("ReadEvents", state_pb2.ReadEventsRequest(run_id=run_id, after_seq=beyond))
        assert (list(none.events), none.last_seq) == ([], 7)


async def test_a_page_of_a_log_ends_at_two_mebibytes(executor: Executor, reader: Reader) -> None:
    run_id = await executor.start(reader.user)
    for seq in range(1, 5):
        await executor.go_on(reader.user, run_id, thinking("x" * (900 << 10)), after=seq)
    page = await reader.call("ReadEvents", state_pb2.ReadEventsRequest(run_id=run_id))
    assert ([event.seq for event in page.events], page.last_seq) == ([1, 2, 3, 4], 5)
    rest = await reader.call("ReadEvents", state_pb2.ReadEventsRequest(run_id=run_id, after_seq=4))
    assert [event.seq for event in rest.events] == [5]


async def test_a_providers_own_state_is_for_services_only(
    aio_stub: Any, identities: Identities, executor: Executor, reader: Reader
) -> None:
    run_id = await executor.start(reader.user)
    await executor.go_on(reader.user, run_id, thinking(provider_state=b"secret"), after=1)
    request = state_pb2.ReadEventsRequest(run_id=run_id, after_seq=1)
    own = await reader.call("ReadEvents", request)
    assert own.events[0].agent_thinking.provider_state == b"" and own.events[0].agent_thinking.text == "Hm."
    service = await aio_stub.ReadEvents(request, metadata=identities.service_metadata(reader.user), timeout=TIMEOUT)
    assert service.events[0].agent_thinking.provider_state == b"secret"


async def test_a_wait_ends_with_the_run(executor: Executor, reader: Reader) -> None:
    run_id = await executor.start(reader.user)
    async with asyncio.TaskGroup() as tasks:
        waits = [tasks.create_task(reader.call("WaitRun", state_pb2.WaitRunRequest(run_id=run_id))) for _ in range(3)]
        await executor.go_on(reader.user, run_id, thinking(), after=1)
        await executor.go_on(reader.user, run_id, completed(), after=2)
    assert [wait.result().run.state for wait in waits] == [types_pb2.RUN_STATE_COMPLETED] * 3
    again = await reader.call("WaitRun", state_pb2.WaitRunRequest(run_id=run_id))
    assert again.run.result == b'{"answer":1}'


@pytest.mark.parametrize("options", [{"timeout": Duration(nanos=50_000_000)}, {}])
async def test_a_wait_that_takes_too_long_answers_the_run_as_it_is(
    executor: Executor, reader: Reader, options: dict[str, Any]
) -> None:
    run_id = await executor.start(reader.user)
    request = state_pb2.WaitRunRequest(run_id=run_id, **options)
    response = await reader.call("WaitRun", request, timeout=TIMEOUT if options else 2.0)
    assert response.run.state == types_pb2.RUN_STATE_RUNNING


async def test_a_passed_deadline_is_one(reader: Reader) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        await reader.call("WaitRun", state_pb2.WaitRunRequest(run_id=new_id()), timeout=0.0)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_session_is_made_read_and_listed(executor: Executor, reader: Reader) -> None:
    wanted = state_pb2.CreateSessionRequest(session_id="talk", title="A talk", policy=types_pb2.SESSION_POLICY_PARALLEL)
    made = (await reader.call("CreateSession", wanted)).session
    assert (made.session_id, made.title, made.policy) == ("talk", "A talk", types_pb2.SESSION_POLICY_PARALLEL)
    assert (made.user_id, made.run_count, made.create_time) == (reader.user.user_id, 0, made.update_time)
    unnamed = (await reader.call("CreateSession", state_pb2.CreateSessionRequest())).session
    assert unnamed.session_id and unnamed.policy == types_pb2.SESSION_POLICY_ENQUEUE

    for ordinal in (1, 2):
        result = await executor.send_one(executor.create(reader.user, session_id="talk"))
        assert (result.state, result.ordinal) == (types_pb2.RUN_STATE_RUNNING, ordinal)
    found = (await reader.call("GetSession", state_pb2.GetSessionRequest(session_id="talk"))).session
    assert found.run_count == 2 and found.update_time.ToNanoseconds() > found.create_time.ToNanoseconds()

    first = await reader.call("ListSessions", state_pb2.ListSessionsRequest(page_size=1))
    rest = await reader.call("ListSessions", state_pb2.ListSessionsRequest(page_token=first.next_page_token))
    assert [session.session_id for session in (*first.sessions, *rest.sessions)] == [unnamed.session_id, "talk"]
    assert (first.next_page_token != "", rest.next_page_token) == (True, "")


async def test_a_session_exists_once_for_its_user(aio_stub: Any, identities: Identities, reader: Reader) -> None:
    request = state_pb2.CreateSessionRequest(session_id="talk", title="First")
    await reader.call("CreateSession", request)
    assert await reader.refused("CreateSession", request) == "SESSION_EXISTS"
    colleague = Reader(aio_stub, identities, reader.user.tenant_id)
    assert await colleague.refused("GetSession", state_pb2.GetSessionRequest(session_id="talk")) == "SESSION_NOT_FOUND"
    assert (await colleague.call("CreateSession", request)).session.title == "First"


async def test_a_session_request_sent_again_gets_its_first_answer(
    aio_stub: Any, identities: Identities, reader: Reader
) -> None:
    request = state_pb2.CreateSessionRequest(session_id="talk")
    metadata = identities.service_metadata(reader.user)
    first = await aio_stub.CreateSession(request, metadata=metadata, timeout=TIMEOUT)
    again = await aio_stub.CreateSession(request, metadata=metadata, timeout=TIMEOUT)
    assert again == first


async def test_malformed_session_requests_are_refused(reader: Reader) -> None:
    for method, request in (
        ("CreateSession", state_pb2.CreateSessionRequest(session_id="x" * 129)),
        ("CreateSession", state_pb2.CreateSessionRequest(title="x" * 201)),
        ("GetSession", state_pb2.GetSessionRequest()),
        ("ListSessions", state_pb2.ListSessionsRequest(page_token="x")),
        ("CreateSession", state_pb2.CreateSessionRequest(session_id="a\x00b")),
        ("GetSession", state_pb2.GetSessionRequest(session_id="a\x00b")),
        ("ListRuns", state_pb2.ListRunsRequest(agent="a\x00b")),
    ):
        assert await reader.refused(method, request) == "REQUEST_INVALID"
    assert await reader.refused("CreateSession", state_pb2.CreateSessionRequest(), role="viewer") == "ROLE_REQUIRED"


async def test_what_comes_later_says_so(reader: Reader) -> None:
    assert await reader.refused("ListCalls", state_pb2.ListCallsRequest()) == "NOT_IMPLEMENTED"


async def test_the_services_role_sees_a_user_nothing_of_others(
    executor: Executor, reader: Reader, contract_environment: dict[str, Any]
) -> None:
    run_id = await executor.start(reader.user, idempotency_key="key", request_hash=b"h")
    connection = await asyncpg.connect(contract_environment["database_url"])
    try:
        for user, expected in ((reader.user, 1), (person(reader.user.tenant_id), 0), (person(), 0)):
            await _become(connection, user)
            for table in ("runs", "events"):
                assert (
                    await connection.fetchval(f"SELECT count(*) FROM state.{table} WHERE run_id = $1", run_id)
                    == expected
                )
        for table in ("leases", "ready", "executors", "idempotency_keys", "inputs", "queued", "events_other"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch(f"SELECT * FROM state.{table}")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("DELETE FROM state.runs")
    finally:
        await connection.close()


async def _become(connection: Any, user: UserExecutionContext) -> None:
    await connection.execute(
        "SELECT set_config('mainspring.tenant_id', $1, false), set_config('mainspring.user_id', $2, false)",
        user.tenant_id,
        user.user_id,
    )
