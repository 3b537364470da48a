"""Caps of agents and tenants, start times and priorities through all services: who waits, why, and that all end."""

from __future__ import annotations

import time
from collections import Counter

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import execution_pb2, registry_pb2, types_pb2
from mainspring.v1 import registry_pb2_grpc as registry_rpc

from test_framework.agents import scripted_agent, step
from test_framework.grpc_testing import error_of
from test_framework.waiting import wait_until
from tests.contract.execution_platform import CALL_SECONDS, Caller

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

QUEUED, RUNNING = types_pb2.RUN_STATE_QUEUED, types_pb2.RUN_STATE_RUNNING
COMPLETED = types_pb2.RUN_STATE_COMPLETED
BRIEF = step("Hm.", delay="400ms", result=1)


async def explained(caller: Caller, run_id: str) -> list[types_pb2.Hold]:
    """Why the run does not go on."""
    request = execution_pb2.ExplainRunRequest(run_id=run_id)
    return list((await caller.execution.ExplainRun(request, **caller.options())).holds)


async def test_runs_above_an_agents_cap_per_user_wait_and_then_end_and_no_other_user_waits(ann: Caller) -> None:
    await ann.register(scripted_agent("capped", BRIEF, limits={"max_concurrent_per_user": 2}))
    runs = [await ann.start("capped") for _ in range(6)]
    assert [run.state for run in runs] == [RUNNING] * 2 + [QUEUED] * 4
    bob = ann.other_user()
    assert (await bob.start("capped")).state == RUNNING
    (hold,) = [hold for hold in await explained(ann, runs[5].run_id) if hold.kind == types_pb2.HOLD_KIND_CAP]
    assert (hold.cap, hold.limit) == (f"agent/capped/user/{ann.user_id}", 2)
    assert len(hold.run_ids) == 2
    ended = [await ann.end_of(run.run_id) for run in runs]
    assert Counter(run.state for run in ended) == {COMPLETED: 6}
    # Never more than two at once: whoever is the third began when the first had ended.
    spans = sorted((run.start_time.ToNanoseconds(), run.end_time.ToNanoseconds()) for run in ended)
    for number in range(2, len(spans)):
        assert sum(end > spans[number][0] for _, end in spans[:number]) < 2


async def test_a_tenants_limits_hold_for_starts_from_when_they_are_put(ann: Caller) -> None:
    await ann.register(scripted_agent("brief", BRIEF))
    stub = registry_rpc.RegistryServiceStub(ann.channel)
    limits = registry_pb2.TenantLimits(max_concurrent=1, backlog_max=1)
    await stub.PutTenant(registry_pb2.PutTenantRequest(limits=limits), **ann.options("admin"))

    async def is_held() -> bool:
        return (await ann.start("brief")).state == QUEUED

    await wait_until(is_held, what="the executor's copy has the limits")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ann.start("brief")
    assert error_of(raised.value).reason == "BACKLOG_FULL"


async def test_a_start_with_a_time_begins_then(ann: Caller) -> None:
    await ann.register(scripted_agent("brief", BRIEF, limits={"timeout": "5s"}))
    due = time.time() + 1.5
    moment = Timestamp()
    moment.FromMicroseconds(int(due * 1e6))
    started = await ann.start("brief", start_time=moment)
    assert started.state == QUEUED
    (hold,) = await explained(ann, started.run_id)
    assert (hold.kind, hold.until) == (types_pb2.HOLD_KIND_TIMER, moment)
    run = await ann.end_of(started.run_id)
    assert run.state == COMPLETED
    assert due <= run.start_time.ToMicroseconds() / 1e6 <= due + CALL_SECONDS / 2
    assert run.deadline.ToMicroseconds() == pytest.approx((due + 5.0) * 1e6, abs=10)
