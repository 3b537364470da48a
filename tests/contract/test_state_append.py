"""Append over the wire: runs made and logs continued, each once; what is stale, repeated, refused or too much."""

from __future__ import annotations

from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.identity import UserExecutionContext, new_id

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities
from test_framework.waiting import wait_until
from tests.contract.state_calls import (
    TIMEOUT,
    Executor,
    cancelled,
    completed,
    log_of,
    person,
    reason_of,
    started,
    thinking,
)

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.


async def run_of(stub: Any, identities: Identities, user: UserExecutionContext, run_id: str) -> types_pb2.Run:
    metadata = identities.metadata(user.tenant_id, user.user_id)
    response = await stub.GetRun(state_pb2.GetRunRequest(run_id=run_id), metadata=metadata, timeout=TIMEOUT)
    run: types_pb2.Run = response.run
    return run


async def test_a_run_goes_from_its_create_to_its_end(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    deadline = Timestamp(seconds=4_000_000_000)
    made = await executor.send_one(executor.create(user, deadline=deadline))
    assert (made.state, made.ordinal, made.last_seq) == (types_pb2.RUN_STATE_RUNNING, 1, 1)
    step = await executor.send_one(executor.append(user, made.run_id, thinking(), after=1))
    assert (step.state, step.ordinal, step.last_seq) == (types_pb2.RUN_STATE_RUNNING, 0, 2)
    done = await executor.send_one(executor.append(user, made.run_id, thinking("So."), completed(), after=2))
    assert (done.state, done.last_seq) == (types_pb2.RUN_STATE_COMPLETED, 4)

    run = await run_of(aio_stub, identities, user, made.run_id)
    assert (run.tenant_id, run.user_id, run.session_id) == (user.tenant_id, user.user_id, user.session_id)
    assert (run.state, run.last_seq, run.ordinal, run.epoch) == (types_pb2.RUN_STATE_COMPLETED, 4, 1, 1)
    assert (run.input, run.result, run.agent, run.trace_id) == (
        b'{"value":1}',
        b'{"answer":1}',
        "lookup",
        user.trace_id,
    )
    assert (run.usage.output_tokens, run.usage.cost_usd, run.deadline) == (5, 0.25, deadline)
    assert [(stage.name, stage.duration_ms) for stage in run.stages] == [("core_execution", 1.25)]
    assert run.root_run_id == run.run_id and not run.HasField("error")
    times = [moment.ToNanoseconds() for moment in (run.create_time, run.start_time, run.end_time, run.released_time)]
    assert times == sorted(times) and times[0] > 0

    events = await log_of(aio_stub, identities, user, made.run_id)
    assert [event.WhichOneof("payload") for event in events] == [
        "agent_started", "agent_thinking", "agent_thinking", "agent_completed",
    ]  # fmt: skip
    assert [event.seq for event in events] == [1, 2, 3, 4]
    assert events[0].agent_started.ordinal == 1 and events[0].trace_id == user.trace_id
    assert events[2].append_id == events[3].append_id != events[1].append_id
    assert all(event.event_time.seconds > 0 for event in events)


async def test_the_first_frame_names_the_process(executor: Executor, user: UserExecutionContext) -> None:
    await executor.start(user)
    assert executor.state_id


async def test_many_appends_of_many_runs_in_one_frame_are_each_answered(
    aio_stub: Any, identities: Identities, executor: Executor
) -> None:
    users = [person() for _ in range(100)]
    creates = [executor.create(user) for user in users]
    steps = [
        executor.append(user, create.run_id, thinking(), after=1) for user, create in zip(users, creates, strict=True)
    ]
    ends = [
        executor.append(user, create.run_id, completed(), after=2) for user, create in zip(users, creates, strict=True)
    ]
    results = await executor.send(*creates, *steps, *ends)
    assert {reason_of(result.status) for result in results} == {""}
    assert [result.last_seq for result in results] == [1] * 100 + [2] * 100 + [3] * 100
    for user, create in zip(users[::20], creates[::20], strict=True):
        events = await log_of(aio_stub, identities, user, create.run_id)
        assert [event.seq for event in events] == [1, 2, 3]


async def test_a_repeated_create_gets_its_first_answer(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    create = executor.create(user)
    first = await executor.send_one(create)
    again = await executor.send_one(create)
    both = await executor.send(create, create)
    for result in (again, *both):
        assert (result.status.code, result.run_id, result.state, result.ordinal) == (0, first.run_id, first.state, 1)
        assert not result.repeated_key
    assert len(await log_of(aio_stub, identities, user, first.run_id)) == 1


async def test_a_repeated_append_is_ok_and_stored_once(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    step, end = executor.append(user, run_id, thinking(), after=1), executor.append(user, run_id, completed(), after=2)
    await executor.send(step, end)
    results = await executor.send(step, end)
    assert [reason_of(result.status) for result in results] == ["", ""]
    assert [event.seq for event in await log_of(aio_stub, identities, user, run_id)] == [1, 2, 3]


async def test_a_run_id_is_used_once(executor: Executor, user: UserExecutionContext) -> None:
    create = executor.create(user)
    await executor.send_one(create)
    create.append_id = new_id()
    assert reason_of((await executor.send_one(create)).status) == "RUN_EXISTS"


async def test_a_stale_append_fails_and_takes_its_successors_with_it(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    results = await executor.send(
        executor.append(user, run_id, thinking(), after=3),
        executor.append(user, run_id, thinking(), after=1),
        executor.append(user, run_id, completed(), after=2),
    )
    assert [reason_of(result.status) for result in results] == ["APPEND_STALE"] * 3
    assert [result.status.code for result in results] == [grpc.StatusCode.ABORTED.value[0]] * 3
    assert len(await log_of(aio_stub, identities, user, run_id)) == 1


async def test_another_epoch_is_stale(executor: Executor, user: UserExecutionContext) -> None:
    run_id = await executor.start(user)
    result = await executor.send_one(executor.append(user, run_id, thinking(), after=1, epoch=2))
    assert reason_of(result.status) == "APPEND_STALE"


async def test_nothing_follows_an_end(executor: Executor, user: UserExecutionContext) -> None:
    run_id = await executor.start(user)
    await executor.go_on(user, run_id, completed(), after=1)
    result = await executor.send_one(executor.append(user, run_id, thinking(), after=2))
    assert reason_of(result.status) == "RUN_ENDED"


async def test_an_unknown_run_and_another_tenants_run_cannot_be_continued(
    executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    unknown = await executor.send_one(executor.append(user, new_id(), thinking(), after=1))
    foreign = await executor.send_one(executor.append(person(), run_id, thinking(), after=1))
    assert [reason_of(result.status) for result in (unknown, foreign)] == ["RUN_NOT_FOUND"] * 2


async def test_a_bad_item_fails_alone(executor: Executor, user: UserExecutionContext) -> None:
    malformed = executor.create(user)
    malformed.create.user_id = ""
    good = executor.create(person())
    results = await executor.send(malformed, good, executor.append(user, "nonsense", thinking(), after=1))
    assert [reason_of(result.status) for result in results] == ["REQUEST_INVALID", "", "REQUEST_INVALID"]


async def test_a_value_that_the_database_refuses_fails_alone(
    aio_stub: Any, identities: Identities, executor: Executor, contract_environment: dict[str, Any]
) -> None:
    users = [person() for _ in range(33)]
    run_ids = [await executor.start(user) for user in users]
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    try:
        await owner.execute(
            "ALTER TABLE state.runs ADD CONSTRAINT no_poison CHECK (position('poison'::bytea IN result) = 0) NOT VALID"
        )
        ends = [
            executor.append(user, run_id, thinking(), completed(b'"poison"' if index == 20 else b'"good"'), after=1)
            for index, (user, run_id) in enumerate(zip(users, run_ids, strict=True))
        ]
        results = await executor.send(*ends)
    finally:
        await owner.execute("ALTER TABLE state.runs DROP CONSTRAINT no_poison")
        await owner.close()
    assert [reason_of(result.status) for result in results] == ["EVENT_REFUSED" if i == 20 else "" for i in range(33)]
    # Nothing of the refused append is left, and the run can still be ended.
    assert len(await log_of(aio_stub, identities, users[20], run_ids[20])) == 1
    failed = events_pb2.RunEvent(agent_failed=events_pb2.AgentFailed(error=types_pb2.RunError(reason="EVENT_REFUSED")))
    await executor.go_on(users[20], run_ids[20], failed, after=1)
    run = await run_of(aio_stub, identities, users[20], run_ids[20])
    assert (run.state, run.error.reason, run.result) == (types_pb2.RUN_STATE_FAILED, "EVENT_REFUSED", b"")


async def test_text_that_postgresql_cannot_hold_is_refused(executor: Executor, user: UserExecutionContext) -> None:
    result = await executor.send_one(executor.create(user, agent="a\x00b"))
    assert reason_of(result.status) == "REQUEST_INVALID"


async def test_an_oversized_event_is_refused_and_the_stream_goes_on(
    executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    result = await executor.send_one(executor.append(user, run_id, thinking("x" * (17 << 20)), after=1))
    assert reason_of(result.status) == "PAYLOAD_TOO_LARGE"
    await executor.go_on(user, run_id, thinking("x" * (1 << 20)), after=1)


async def test_an_idempotency_key_names_its_first_run(executor: Executor, user: UserExecutionContext) -> None:
    key = {"idempotency_key": "order-7", "request_hash": b"h" * 32}
    first, second = await executor.send(executor.create(user, **key), executor.create(user, **key))
    assert not first.repeated_key
    assert (second.status.code, second.run_id, second.repeated_key) == (0, first.run_id, True)
    await executor.go_on(user, first.run_id, completed(), after=1)
    third = await executor.send_one(executor.create(user, **key))
    assert (third.run_id, third.repeated_key, third.state) == (first.run_id, True, types_pb2.RUN_STATE_COMPLETED)
    other = await executor.send_one(executor.create(user, **{**key, "request_hash": b"x" * 32}))
    assert reason_of(other.status) == "IDEMPOTENCY_KEY_REUSED"
    stranger = await executor.send_one(executor.create(person(user.tenant_id), **key))
    assert (stranger.status.code, stranger.repeated_key) == (0, False)


async def test_a_session_lets_its_runs_begin_one_after_the_other(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    results = await executor.send(*(executor.create(user) for _ in range(3)))
    assert [(result.state, result.ordinal, result.last_seq) for result in results] == [
        (types_pb2.RUN_STATE_RUNNING, 1, 1),
        (types_pb2.RUN_STATE_QUEUED, 2, 0),
        (types_pb2.RUN_STATE_QUEUED, 3, 0),
    ]
    # Nobody holds a queued run yet: its maker may not begin it.
    begin = executor.append(user, results[1].run_id, started())
    assert reason_of((await executor.send_one(begin)).status) == "TRANSITION_ILLEGAL"
    run = await run_of(aio_stub, identities, user, results[1].run_id)
    assert (run.state, run.HasField("start_time")) == (types_pb2.RUN_STATE_QUEUED, False)
    again = await executor.send_one(executor.create(user))
    assert again.ordinal == 4


async def test_a_session_that_rejects_takes_one_run_at_a_time(executor: Executor, user: UserExecutionContext) -> None:
    policy = {"policy": types_pb2.SESSION_POLICY_REJECT}
    run_id = await executor.start(user, **policy)
    key = {"idempotency_key": "k", "request_hash": b"h"}
    refused = await executor.send_one(executor.create(user, **policy, **key))
    assert reason_of(refused.status) == "SESSION_BUSY"
    await executor.go_on(user, run_id, completed(), after=1)
    taken = await executor.send_one(executor.create(user, **key))
    assert (taken.status.code, taken.state, taken.ordinal, taken.repeated_key) == (0, 2, 2, False)


async def test_a_parallel_session_lets_all_runs_begin(executor: Executor, user: UserExecutionContext) -> None:
    policy = {"policy": types_pb2.SESSION_POLICY_PARALLEL}
    results = await executor.send(*(executor.create(user, **policy) for _ in range(3)))
    assert [(result.state, result.ordinal) for result in results] == [(2, 1), (2, 2), (2, 3)]


async def test_sessions_of_the_same_name_of_two_users_are_two(executor: Executor, user: UserExecutionContext) -> None:
    other = person(user.tenant_id)
    await executor.start(user)
    assert (await executor.send_one(executor.create(other, session_id=user.session_id))).ordinal == 1


async def test_ordinals_beyond_a_byte_reach_the_log(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    policy = {"policy": types_pb2.SESSION_POLICY_PARALLEL}
    results = await executor.send(*(executor.create(user, **policy) for _ in range(130)))
    assert [result.ordinal for result in results] == list(range(1, 131))
    events = await log_of(aio_stub, identities, user, results[-1].run_id)
    assert events[0].agent_started.ordinal == 130 and events[0].agent_started.attempt == 1


async def test_a_consumed_input_is_marked_by_the_append(
    aio_stub: Any,
    identities: Identities,
    executor: Executor,
    user: UserExecutionContext,
    contract_environment: dict[str, Any],
) -> None:
    run_id = await executor.start(user)
    metadata = identities.metadata(user.tenant_id, user.user_id)
    asked = state_pb2.PutInputRequest(run_id=run_id, request_id="stop-1", cancel=state_pb2.CancelInput())
    await aio_stub.PutInput(asked, metadata=metadata, timeout=TIMEOUT)
    await executor.go_on(user, run_id, cancelled(), after=1, consumed_request_ids=["stop-1", "unknown"])
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    try:
        consumed = await owner.fetchval("SELECT consumed_seq FROM state.inputs WHERE run_id = $1", run_id)
    finally:
        await owner.close()
    assert consumed == 2


async def test_appends_to_young_tables_go_by_primary_keys_alone(
    executor: Executor, user: UserExecutionContext, contract_environment: dict[str, Any]
) -> None:
    run_id = await executor.start(user)
    await executor.go_on(user, run_id, completed(), after=1)
    owner = await asyncpg.connect(contract_environment["owner_database_url"])

    async def scans() -> dict[str, int]:
        rows = await owner.fetch("SELECT indexrelname, idx_scan FROM pg_stat_user_indexes WHERE schemaname = 'state'")
        return {row["indexrelname"]: row["idx_scan"] for row in rows}

    async def is_counted() -> bool:
        counted = await scans()
        return all(counted[name] > 0 for name in ("runs_pkey", "sessions_pkey", "leases_pkey"))

    try:
        await wait_until(is_counted, what="the statistics of the appends")
        counted = await scans()
    finally:
        await owner.close()
    # This module asks for no list. A tenant's whole history would be read for each append if one of these served it.
    assert [counted[name] for name in ("runs_of_user", "runs_of_session", "sessions_newest")] == [0, 0, 0]


async def test_only_services_append(aio_stub: Any, identities: Identities) -> None:
    call = aio_stub.Append(metadata=identities.metadata("acme", "ann", "admin"), timeout=TIMEOUT)
    with pytest.raises(grpc.RpcError) as raised:
        await call.read()
    assert error_of(raised.value).reason == "ROLE_REQUIRED"


async def test_an_append_stream_ends_when_all_is_answered(
    aio_stub: Any, identities: Identities, user: UserExecutionContext
) -> None:
    executor = Executor(aio_stub, identities)
    call = aio_stub.Append(metadata=identities.service_metadata(), timeout=TIMEOUT)
    appends = [executor.create(person()) for _ in range(20)]
    for item_id, append in enumerate(appends, start=1):
        append.item_id = item_id
    await call.write(state_pb2.AppendRequest(appends=appends))
    await call.done_writing()
    results = []
    while (response := await call.read()) is not grpc.aio.EOF:
        results.extend(response.results)
    assert sorted(result.item_id for result in results) == list(range(1, 21))
    assert await call.code() is grpc.StatusCode.OK
    executor.close()
