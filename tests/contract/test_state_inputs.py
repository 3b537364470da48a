"""What is asked of runs over the wire: done once, or refused clearly, in every state, twice, late, and by strangers."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import grpc
import pytest
from mainspring.v1 import events_pb2, state_pb2
from mainspring_kit.identity import UserExecutionContext, new_id

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities
from tests.contract.state_calls import TIMEOUT, Executor, claiming, completed, person, thinking
from tests.contract.state_inputs import RELEASE, Asker, park, paused, resumed

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.

UNCONSUMED_MAX = 1_000


@pytest.fixture
def ann(aio_stub: Any, identities: Identities, user: UserExecutionContext) -> Asker:
    """The run's user."""
    return Asker(aio_stub, identities, user)


ALL: dict[str, dict[str, Any]] = {
    "cancel": {"cancel": state_pb2.CancelInput(reason="enough")},
    "pause": {"pause": state_pb2.PauseInput(reason="lunch")},
    "signal": {"signal": state_pb2.SignalInput(name="go", data=b'{"a":1}')},
}


@pytest.mark.parametrize("kind", ALL)
async def test_an_input_is_stored_as_it_was_asked_and_reaches_the_holder(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker, kind: str
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id, credit=0) as holder:
        run_id = await executor.start(user)
        stored = await ann.put(run_id, request_id="r", **ALL[kind])
        assert stored.WhichOneof("input") == kind
        assert getattr(stored, kind) == ALL[kind][kind]
        assert (stored.run_id, stored.request_id, stored.requested_by) == (run_id, "r", user.user_id)
        assert await holder.next_input() == stored
        assert await ann.put(run_id, request_id="r", **ALL[kind]) == stored
        await executor.go_on(user, run_id, completed(), after=1, consumed_request_ids=["r"])
        # The first answer, though the run has ended since; another is refused.
        assert await ann.put(run_id, request_id="r", **ALL[kind]) == stored
        assert await ann.try_put(run_id, **ALL[kind]) == "RUN_ENDED"


async def test_a_request_id_asks_one_thing_of_a_run(executor: Executor, user: UserExecutionContext, ann: Asker) -> None:
    first, second = await executor.start(user), await executor.start(person(user.tenant_id))
    assert await ann.signal(first, request_id="r") == ""
    assert await ann.try_put(first, request_id="r", cancel=state_pb2.CancelInput()) == "IDEMPOTENCY_KEY_REUSED"
    assert await ann.signal(first, "other", request_id="r") == ""
    assert await ann.signal(second, request_id="r") == "RUN_NOT_FOUND"


@pytest.mark.parametrize("kind", [*ALL, "resume"])
async def test_a_foreign_run_is_not_found(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, kind: str
) -> None:
    run_id = await executor.start(user)
    asked = (ALL | {"resume": {"resume": state_pb2.ResumeInput()}})[kind]
    for stranger in (person(), person(user.tenant_id)):
        for role in ("runner", "admin"):
            assert await Asker(aio_stub, identities, stranger, role=role).try_put(run_id, **asked) == "RUN_NOT_FOUND"
    assert await Asker(aio_stub, identities, user).try_put(new_id(), **asked) == "RUN_NOT_FOUND"


async def test_malformed_inputs_are_refused_and_change_nothing(
    aio_stub: Any, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    run_id = await executor.start(user)
    for wrong in (
        {},
        {"signal": state_pb2.SignalInput()},
        {"signal": state_pb2.SignalInput(name="n" * 101)},
        {"signal": state_pb2.SignalInput(name="n", data=b"x" * ((1 << 20) + 1))},
        {"pause": state_pb2.PauseInput(reason="r" * 1_001)},
        {"signal": state_pb2.SignalInput(name="n"), "request_id": "r" * 129},
        {"signal": state_pb2.SignalInput(name="n"), "request_id": "\x00"},
    ):
        assert await ann.try_put(run_id, **wrong) == "REQUEST_INVALID"
    assert await ann.try_put("no-uuid", signal=state_pb2.SignalInput(name="n")) == "REQUEST_INVALID"
    with pytest.raises(grpc.RpcError) as raised:
        request = state_pb2.PutInputRequest(run_id=run_id, signal=state_pb2.SignalInput(name="n"))
        await aio_stub.PutInput(request, timeout=TIMEOUT)
    assert error_of(raised.value).reason == "TOKEN_MISSING"
    big = state_pb2.SignalInput(name="n", data=b"x" * (1 << 20))
    assert await ann.try_put(run_id, signal=big) == ""


async def test_a_pause_of_a_paused_run_and_a_resume_of_another_are_refused(
    executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    run_id = await executor.start(user)
    # What is asked for and not yet done counts.
    assert await ann.resume(run_id) == "TRANSITION_ILLEGAL"
    assert await ann.pause(run_id) == ""
    assert await ann.pause(run_id) == "TRANSITION_ILLEGAL"
    assert await ann.resume(run_id) == ""
    assert await ann.resume(run_id) == "TRANSITION_ILLEGAL"
    assert await ann.try_put(run_id, request_id="p", pause=state_pb2.PauseInput()) == ""
    await executor.go_on(user, run_id, paused(), after=1, consumed_request_ids=["p"])
    assert await ann.pause(run_id) == ""


async def test_a_paused_run_whose_inputs_are_consumed_is_resumed_once(
    executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    run_id = await executor.start(user)
    assert await ann.try_put(run_id, request_id="p", pause=state_pb2.PauseInput()) == ""
    await executor.go_on(user, run_id, paused(), after=1, consumed_request_ids=["p"], release=RELEASE)
    assert await ann.pause(run_id) == "TRANSITION_ILLEGAL"
    answers = await asyncio.gather(*(ann.resume(run_id) for _ in range(8)))
    assert sorted(answers) == ["", *["TRANSITION_ILLEGAL"] * 7]


async def test_a_queued_run_keeps_what_is_asked_until_its_turn(
    aio_stub: Any,
    identities: Identities,
    executor: Executor,
    user: UserExecutionContext,
    ann: Asker,
    contract_environment: dict[str, Any],
) -> None:
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    await owner.execute("TRUNCATE state.leases, state.ready, state.queued, state.executors")
    head = await executor.start(user)
    queued = (await executor.send_one(executor.create(user))).run_id
    assert (await ann.pause(queued), await ann.signal(queued)) == ("", "")
    assert await owner.fetchval("SELECT count(*) FROM state.ready") == 0
    await owner.close()
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        await executor.go_on(user, head, completed(), after=1)
        claimed = await claimer.next_claim()
        assert [run_input.WhichOneof("input") for run_input in claimed.inputs] == ["pause", "signal"]


async def test_a_run_takes_so_many_signals_and_still_hears_a_cancel(
    executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    run_id = await park(executor, user)
    for _ in range(0, UNCONSUMED_MAX, 50):
        refusals = await asyncio.gather(*(ann.signal(run_id) for _ in range(50)))
        assert set(refusals) == {""}
    assert await ann.signal(run_id, request_id="one-more") == "QUEUE_FULL"
    assert await ann.cancel(run_id) == ""
    assert await ann.pause(run_id) == ""


async def test_consumed_inputs_are_consumed_once_and_by_an_append_without_events_too(
    executor: Executor, user: UserExecutionContext, ann: Asker, contract_environment: dict[str, Any]
) -> None:
    run_id = await executor.start(user)
    for request_id in ("a", "b"):
        assert await ann.signal(run_id, request_id=request_id) == ""
    await executor.go_on(user, run_id, after=1, consumed_request_ids=["a", "unknown"])
    await executor.go_on(user, run_id, thinking(), after=1, consumed_request_ids=["a", "b"])
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    rows = await owner.fetch("SELECT request_id, consumed_seq FROM state.inputs WHERE run_id = $1", run_id)
    await owner.close()
    assert {row["request_id"]: row["consumed_seq"] for row in rows} == {"a": 1, "b": 2}


async def test_a_stale_holder_consumes_nothing(
    executor: Executor, user: UserExecutionContext, ann: Asker, contract_environment: dict[str, Any]
) -> None:
    run_id = await executor.start(user)
    assert await ann.signal(run_id, request_id="a") == ""
    late = executor.append(user, run_id, after=1, epoch=2, consumed_request_ids=["a"], release=RELEASE)
    await executor.send_one(late)
    resume = events_pb2.RunEvent.FromString(resumed().SerializeToString())
    await executor.send_one(executor.append(user, run_id, resume, after=1, consumed_request_ids=["a"]))
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    row = await owner.fetchrow("SELECT consumed_seq FROM state.inputs WHERE run_id = $1", run_id)
    held = await owner.fetchval("SELECT count(*) FROM state.leases WHERE run_id = $1", run_id)
    await owner.close()
    assert (row is not None and row["consumed_seq"], held) == (None, 1)
