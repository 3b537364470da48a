"""What runs cost, why they stand still, and who is told of their ends: over the wire, and from the outbox."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import grpc
import pytest
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit import postgres
from mainspring_kit.identity import UserExecutionContext, new_id
from mainspring_state.store.webhooks import Webhooks

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities
from tests.contract.state_calls import TIMEOUT, Executor, cancelled, claiming, completed, person, reason_of, thinking
from tests.contract.state_inputs import (
    RELEASE,
    Asker,
    ask_person,
    due_in,
    fork_sub_run,
    moment,
    paused,
    waiting,
)

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.

COUNTED = types_pb2.RunMetrics(
    model_calls=2,
    tool_calls=3,
    tool_errors=1,
    cache_hits=1,
    retries=4,
    waiting_ms=12.5,
    agent="forged",
    state=types_pb2.RUN_STATE_QUEUED,
)


@pytest.fixture(autouse=True)
async def nothing_to_claim(contract_environment: dict[str, Any]) -> None:
    """What another test left undriven is not there for this one."""
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    try:
        await owner.execute("TRUNCATE state.leases, state.ready, state.queued, state.executors, state.webhooks")
    finally:
        await owner.close()


@pytest.fixture
def ann(aio_stub: Any, identities: Identities, user: UserExecutionContext) -> Asker:
    """The run's user."""
    return Asker(aio_stub, identities, user)


@pytest.fixture
async def webhooks(contract_environment: dict[str, Any]) -> AsyncIterator[Webhooks]:
    """The outbox as a state process sees it."""
    async with await postgres.connect(contract_environment["database_url"]) as pool:
        yield Webhooks(pool)


class Books:
    """What an operator of a tenant reads."""

    def __init__(self, stub: Any, identities: Identities, tenant_id: str) -> None:
        self._stub = stub
        self._metadata = identities.metadata(tenant_id, person().user_id, "operator")

    async def page(self, **fields: Any) -> state_pb2.ListRunMetricsResponse:
        """A page of rows."""
        request = state_pb2.ListRunMetricsRequest(**fields)
        response: state_pb2.ListRunMetricsResponse = await self._stub.ListRunMetrics(
            request, metadata=self._metadata, timeout=TIMEOUT
        )
        return response

    async def rows(self, **fields: Any) -> list[types_pb2.RunMetrics]:
        """The rows of a page."""
        return list((await self.page(**fields)).metrics)


@pytest.fixture
def books(aio_stub: Any, identities: Identities, user: UserExecutionContext) -> Books:
    """Those of the user's tenant."""
    return Books(aio_stub, identities, user.tenant_id)


async def test_a_row_comes_with_the_end_and_says_what_state_and_the_holder_know(
    executor: Executor, user: UserExecutionContext, books: Books
) -> None:
    before = time.time()
    run_id = await executor.start(user)
    assert await books.rows() == []
    await executor.go_on(user, run_id, completed(), after=1, metrics=COUNTED)
    (row,) = await books.rows()
    assert (row.run_id, row.agent, row.agent_version, row.user_id) == (run_id, "lookup", "1", user.user_id)
    assert (row.state, row.error_reason, row.trace_id) == (types_pb2.RUN_STATE_COMPLETED, "", user.trace_id)
    assert (row.model_calls, row.tool_calls, row.tool_errors, row.cache_hits, row.retries) == (2, 3, 1, 1, 4)
    assert (row.waiting_ms, row.recoveries, row.queue_ms) == (12.5, 0, 0.0)
    assert row.usage == types_pb2.Usage(input_tokens=3, output_tokens=5, cost_usd=0.25)
    assert [stage.name for stage in row.stages] == ["core_execution"]
    assert 0 < row.duration_ms < (time.time() - before) * 1e3 + 1_000
    assert row.end_time.ToNanoseconds() / 1e9 == pytest.approx(time.time(), abs=30)


async def test_a_run_that_ends_without_metrics_has_a_row_too(
    executor: Executor, user: UserExecutionContext, books: Books
) -> None:
    run_id = await executor.start(user)
    error = types_pb2.RunError(code="INTERNAL", reason="AGENT_BROKEN", message="no")
    failed = events_pb2.RunEvent(agent_failed=events_pb2.AgentFailed(error=error))
    append = executor.append(user, run_id, failed, after=1)
    for _ in range(2):
        assert reason_of((await executor.send_one(append)).status) == ""
    (row,) = await books.rows()
    assert (row.state, row.error_reason) == (types_pb2.RUN_STATE_FAILED, "AGENT_BROKEN")
    assert (row.model_calls, row.waiting_ms, row.usage.cost_usd) == (0, 0.0, 0.0)


async def test_a_row_knows_the_wait_in_line_and_who_took_over(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, books: Books
) -> None:
    async with claiming(aio_stub, identities) as claimer:
        head, second = [result.run_id for result in await executor.send(*(executor.create(user) for _ in range(2)))]
        claimed = await claimer.next_claim()
        assert (claimed.run.run_id, claimed.takeovers) == (head, 1)
        await executor.go_on(user, head, completed(), after=1, epoch=2)
        claimed = await claimer.next_claim()
        assert claimed.run.run_id == second
        await executor.go_on(user, second, cancelled(), after=0, epoch=2)
    rows = {row.run_id: row for row in await books.rows()}
    assert (rows[head].recoveries, rows[second].recoveries) == (1, 0)
    # It never began: all of its time was spent in line.
    assert rows[second].queue_ms == rows[second].duration_ms > rows[head].queue_ms == 0


async def test_operators_see_the_tenants_rows_and_nobody_else_any(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, books: Books
) -> None:
    runs = []
    for owner in (user, person(user.tenant_id), person()):
        runs.append(await executor.start(owner))
        await executor.go_on(owner, runs[-1], completed(), after=1)
    assert [row.run_id for row in await books.rows()] == [runs[1], runs[0]]
    assert await Books(aio_stub, identities, person().tenant_id).rows() == []
    for role in ("viewer", "runner"):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            metadata = identities.metadata(user.tenant_id, user.user_id, role)
            await aio_stub.ListRunMetrics(state_pb2.ListRunMetricsRequest(), metadata=metadata, timeout=TIMEOUT)
        assert error_of(raised.value).reason == "ROLE_REQUIRED"


async def test_rows_come_in_pages_and_by_what_is_asked(
    executor: Executor, user: UserExecutionContext, books: Books
) -> None:
    runs = []
    for number in range(7):
        other = person(user.tenant_id)
        runs.append(await executor.start(other, agent=f"agent-{number % 2}"))
        await executor.go_on(other, runs[-1], completed(), after=1)
    found, token = [], ""
    while True:
        page = await books.page(page_size=3, page_token=token)
        found += [row.run_id for row in page.metrics]
        token = page.next_page_token
        if not token:
            break
    assert found == sorted(runs, reverse=True)
    assert [row.run_id for row in await books.rows(agent="agent-1")] == sorted(runs[1::2], reverse=True)
    assert [row.run_id for row in await books.rows(run_id=runs[2])] == [runs[2]]
    assert await books.rows(run_id=new_id()) == await books.rows(run_id="none") == await books.rows(agent="x") == []
    assert len(await books.rows(since=moment(-60))) == 7
    assert await books.rows(since=moment(60)) == await books.rows(run_id=runs[0], since=moment(60)) == []
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await books.rows(page_token="x")
    assert error_of(raised.value).reason == "REQUEST_INVALID"


async def holds(asker: Asker, run_id: str) -> dict[types_pb2.HoldKind.ValueType, types_pb2.Hold]:
    """Why a run does not go on, by kind."""
    return {hold.kind: hold for hold in (await asker.run(run_id, explain=True)).holds}


async def test_a_run_in_line_names_those_before_it(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id, credit=0):
        runs = [result.run_id for result in await executor.send(*(executor.create(user) for _ in range(14)))]
        explained = await ann.run(runs[0], explain=True)
        assert (list(explained.holds), explained.executor_id) == ([], executor.executor_id)
        assert list((await ann.run(runs[1])).holds) == []
        second, last = await holds(ann, runs[1]), await holds(ann, runs[-1])
        assert list(second) == list(last) == [types_pb2.HOLD_KIND_SESSION_LINE]
        assert list(second[types_pb2.HOLD_KIND_SESSION_LINE].run_ids) == runs[:1]
        line = last[types_pb2.HOLD_KIND_SESSION_LINE]
        assert (list(line.run_ids), line.position) == (runs[:10], 13)
        await executor.go_on(user, runs[0], completed(), after=1)
        assert (await holds(ann, runs[2]))[types_pb2.HOLD_KIND_SESSION_LINE].position == 1
        assert await holds(ann, runs[0]) == {}


async def test_a_waiting_run_names_what_it_waits_for(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id, credit=0):
        expiry = moment(500)
        approval_id = await ask_person(executor, user, role="operator", expires_time=expiry)
        held = (await holds(ann, approval_id.partition(".")[0]))[types_pb2.HOLD_KIND_APPROVAL]
        assert (held.approval_id, held.until) == (approval_id, expiry)
        assert "operator" in held.detail and "May I?" in held.detail
        until = moment(900)
        for wait_for, kind in (
            (types_pb2.WAIT_KIND_SIGNAL, types_pb2.HOLD_KIND_SIGNAL),
            (types_pb2.WAIT_KIND_TIMER, types_pb2.HOLD_KIND_TIMER),
        ):
            other = person()
            run_id = await executor.start(other)
            stopped = waiting(wait_for=wait_for, until=until, detail="the sun", call_ids=["c"])
            await executor.go_on(other, run_id, stopped, after=1, release=RELEASE)
            found = await holds(Asker(aio_stub, identities, other), run_id)
            assert list(found) == [kind]
            assert (found[kind].until, found[kind].call_id) == (until, "c")
            assert "the sun" in found[kind].detail


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("TOOL_TIMED_OUT", types_pb2.HOLD_KIND_BACKOFF),
        ("WORKER_UNAVAILABLE", types_pb2.HOLD_KIND_NO_WORKER),
        ("CIRCUIT_OPEN", types_pb2.HOLD_KIND_BREAKER),
    ],
)
async def test_a_failed_attempt_that_waits_for_the_next_says_so(
    aio_stub: Any,
    identities: Identities,
    executor: Executor,
    user: UserExecutionContext,
    ann: Asker,
    reason: str,
    kind: types_pb2.HoldKind.ValueType,
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id, credit=0):
        run_id, until = await executor.start(user), moment(900)
        error = types_pb2.RunError(reason=reason, message="it was down")
        attempt = events_pb2.AttemptFailed(call_id="c", attempt=2, error=error, retry_time=until)
        failed = events_pb2.RunEvent(attempt_failed=attempt, safe_to_skip=True)
        stopped = waiting(wait_for=types_pb2.WAIT_KIND_TIMER, until=until)
        await executor.go_on(user, run_id, failed, stopped, after=1, release=due_in(900))
        found = await holds(ann, run_id)
        assert list(found) == [kind]
        assert found[kind].until == until
        assert "it was down" in found[kind].detail


async def test_a_paused_run_and_one_with_sub_runs_say_so(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id, credit=0):
        run_id = await executor.start(user)
        children = [await fork_sub_run(executor, user, run_id) for _ in range(3)]
        await executor.go_on(user, children[1], completed(), after=1)
        await executor.go_on(user, run_id, waiting(wait_for=types_pb2.WAIT_KIND_RUN), after=1)
        found = await holds(ann, run_id)
        assert list(found) == [types_pb2.HOLD_KIND_SUB_RUN]
        assert list(found[types_pb2.HOLD_KIND_SUB_RUN].run_ids) == [children[0], children[2]]
        await executor.go_on(user, run_id, paused(), after=2)
        assert "paused by ann" in (await holds(ann, run_id))[types_pb2.HOLD_KIND_PAUSED].detail


async def test_a_run_that_only_an_executor_is_missing_for_says_so(
    executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    run_id = await executor.start(user)
    await executor.go_on(user, run_id, thinking(), after=1, release=due_in(-1))
    assert list(await holds(ann, run_id)) == [types_pb2.HOLD_KIND_NO_EXECUTOR]
    # Nobody is needed for one that waits for something that has not come.
    waits = await executor.send_one(executor.append(user, run_id, waiting(), after=2, release=RELEASE))
    assert reason_of(waits.status) == ""


async def test_explaining_a_foreign_run_says_nothing(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await Asker(aio_stub, identities, person(user.tenant_id), role="admin").run(run_id, explain=True)
    assert error_of(raised.value).reason == "RUN_NOT_FOUND"


async def test_the_end_of_a_run_with_a_webhook_is_told_until_it_is_settled(
    executor: Executor, user: UserExecutionContext, webhooks: Webhooks
) -> None:
    hook = state_pb2.Webhook(url="https://example.test/hook", credential="key")
    run_id = await executor.start(user, webhook=hook)
    silent = person()
    await executor.go_on(silent, await executor.start(silent), completed(), after=1)
    assert await webhooks.due(item_max=10, hold_seconds=60) == []
    await executor.go_on(user, run_id, completed(), after=1)
    (due,) = await webhooks.due(item_max=10, hold_seconds=0)
    assert (due.url, due.credential, due.attempts) == ("https://example.test/hook", "key", 1)
    assert (due.run.run_id, due.run.state, due.run.result) == (run_id, types_pb2.RUN_STATE_COMPLETED, b'{"answer":1}')
    # Its taker died: somebody else takes it, and then nobody as long as that one holds it.
    (again,) = await webhooks.due(item_max=10, hold_seconds=60)
    assert again.attempts == 2
    assert await webhooks.due(item_max=10, hold_seconds=60) == []
    await webhooks.settle(due.run, is_done=False, next_due=datetime.now(UTC) - timedelta(seconds=1), error="500\x00")
    (third,) = await webhooks.due(item_max=10, hold_seconds=60)
    assert third.attempts == 3
    await webhooks.settle(due.run, is_done=False, next_due=None, error="410")
    assert await webhooks.due(item_max=10, hold_seconds=60) == []
    await webhooks.settle(due.run, is_done=True, next_due=None, error="")
    await webhooks.settle(due.run, is_done=True, next_due=None, error="")
    assert await webhooks.due(item_max=10, hold_seconds=60) == []


async def test_a_webhook_that_no_row_can_hold_is_refused(executor: Executor) -> None:
    for wrong in (
        state_pb2.Webhook(),
        state_pb2.Webhook(url="u" * 2_001),
        state_pb2.Webhook(url="\x00"),
        state_pb2.Webhook(url="u", credential="c" * 129),
    ):
        create = executor.create(person(), webhook=wrong)
        assert reason_of((await executor.send_one(create)).status) == "REQUEST_INVALID"


async def test_the_database_itself_keeps_tenants_and_users_apart(
    executor: Executor, user: UserExecutionContext, contract_environment: dict[str, Any]
) -> None:
    stranger, colleague = person(), person(user.tenant_id)
    run_id = await executor.start(user)
    await executor.go_on(user, run_id, completed(), after=1)
    other = person(user.tenant_id)
    await ask_person(executor, other, role="operator")
    service = await asyncpg.connect(contract_environment["database_url"])

    async def shown(tenant_id: str, user_id: str, roles: str) -> tuple[int, int, int]:
        async with service.transaction():
            values = {"tenant_id": tenant_id, "user_id": user_id, "answer_roles": roles}
            for name, value in values.items():
                await service.execute("SELECT set_config($1, $2, true)", f"mainspring.{name}", value)
            rows = await service.fetchval("SELECT count(*) FROM state.run_metrics WHERE run_id = $1", run_id)
            approvals = await service.fetchval("SELECT count(*) FROM state.approvals WHERE user_id = $1", other.user_id)
            known = await service.fetch("SELECT * FROM state.circumstances($1, $2, $3)", tenant_id, user_id, run_id)
        return rows, approvals, len(known)

    try:
        assert await shown(user.tenant_id, user.user_id, "") == (1, 0, 1)
        assert await shown(user.tenant_id, other.user_id, "") == (1, 1, 0)
        assert await shown(user.tenant_id, colleague.user_id, "operator,admin") == (1, 1, 0)
        assert await shown(stranger.tenant_id, stranger.user_id, "operator,admin") == (0, 0, 0)
        assert await service.fetchval("SELECT count(*) FROM state.run_metrics") == 0
        for closed in ("state.webhooks", "state.inputs", "state.leases", "state.ready"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await service.fetchval(f"SELECT count(*) FROM {closed}")
    finally:
        await service.close()
