"""Runs whose executor is gone: another one takes them up from the log, and repeats nothing that is finished."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import orjson
import pytest
from mainspring.v1 import execution_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_execution.__main__ import Execution, wired
from mainspring_execution.config import ExecutionSettings
from mainspring_kit.errors import MainspringError, from_status

from test_framework.agents import call, scripted_agent, step
from test_framework.gate import Gate
from test_framework.identities import make_context
from test_framework.rows import Rows
from test_framework.servers import Database
from test_framework.waiting import wait_until
from tests.contract.execution_platform import Caller, names, terminal

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

DONE = step("Done.", result={"calls": "{{calls}}"})


# Any: servicers and settings have no common base.
@pytest.fixture
def settings(contract_environment: dict[str, Any]) -> ExecutionSettings:
    """Of the executor that a test ends."""
    return ExecutionSettings(**contract_environment)


@asynccontextmanager
async def doomed(settings: ExecutionSettings) -> AsyncIterator[Execution]:
    """An executor that vanishes at the end of the block: no drain, no word to anybody."""
    async with wired(settings) as execution:
        await wait_until(lambda: execution.around.lease.is_held and execution.around.catalog.is_fresh)
        yield execution


async def start_on(execution: Execution, caller: Caller, *, agent: str, value: Any = None) -> str:
    """Starts a run on this very executor (Any: a JSON value); its id."""
    context = replace(make_context(caller.tenant_id, caller.user_id), roles=("runner",))
    answered: asyncio.Future[pb.StartResult] = asyncio.get_running_loop().create_future()
    start = pb.StartRunRequest(agent=agent, input=orjson.dumps({"value": value}))
    execution.runs.start(pb.StartItem(context=context.to_message(), start=start), answered.set_result)
    async with asyncio.timeout(10):
        result = await answered
    assert result.status.code == 0, from_status(result.status)
    return result.run_id


async def test_a_lost_pure_call_is_made_again_under_its_id(ann: Caller, settings: ExecutionSettings) -> None:
    await ann.register(scripted_agent("napping", step("Nap.", call("diagnostics.sleep", seconds=0.5)), DONE))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="napping")
        await ann.reached(run_id, "tool_executing")
    run = await ann.end_of(run_id)
    events = await ann.log(run_id)
    assert run.state == types_pb2.RUN_STATE_COMPLETED
    assert names(events) == [
        "agent_started",
        "agent_thinking",
        "tool_executing",
        "run_recovered",
        "tool_completed",
        "agent_thinking",
        "agent_completed",
    ]
    assert (events[3].run_recovered.attempt, list(events[3].run_recovered.lost_calls)) == (1, [f"{run_id}.2.0"])
    assert events[4].tool_completed.call_id == f"{run_id}.2.0"
    assert (run.epoch, [event.agent_thinking.step for event in (events[1], events[5])]) == (2, [1, 2])
    assert sum(stage.duration_ms for stage in run.stages) >= 500


async def test_a_lost_keyed_call_takes_effect_once(ann: Caller, settings: ExecutionSettings, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    await ann.register(scripted_agent("gated", step("Wait.", call("probe.gate", folder="{{input.value}}")), DONE))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="gated", value=str(tmp_path))
        await gate.wait_for(1)
    await ann.reached(run_id, "run_recovered")
    gate.open()
    run = await ann.end_of(run_id)
    assert run.state == types_pb2.RUN_STATE_COMPLETED
    assert gate.effects() == [f"{run_id}.2.0"]


async def test_an_executor_that_leaves_hands_its_runs_over_at_once(ann: Caller, settings: ExecutionSettings) -> None:
    await ann.register(scripted_agent("thinking", step("A thought."), step("Hm.", delay="800ms"), DONE))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="thinking")
        await ann.reached(run_id, "agent_thinking")
        await execution.drain(0)
        refused: list[pb.StartResult] = []
        execution.runs.start(pb.StartItem(item_id=1), refused.append)
        assert from_status(refused[0].status).reason_name == "DRAINING"
        run = await ann.end_of(run_id)
    events = await ann.log(run_id)
    assert run.state == types_pb2.RUN_STATE_COMPLETED
    assert names(events).count("run_recovered") == 1
    assert [event.agent_thinking.step for event in events if event.HasField("agent_thinking")] == [1, 2, 3]


async def test_a_draining_executor_ends_what_its_step_ends(ann: Caller, settings: ExecutionSettings) -> None:
    await ann.register(scripted_agent("brief", step("Hm.", delay="300ms", result=1)))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="brief")
        await execution.drain(10)
    events = await ann.log(run_id)
    assert names(events)[-1] == "agent_completed"
    assert "run_recovered" not in names(events)


async def test_a_tool_that_the_copy_does_not_know_yet_is_asked_for(
    ann: Caller, settings: ExecutionSettings, tmp_path: Path
) -> None:
    await ann.register(scripted_agent("gated", step("Wait.", call("probe.gate", folder="{{input.value}}")), DONE))
    gate = Gate(tmp_path)
    gate.open()
    async with doomed(settings) as execution:
        # As on an executor that has claimed a run before its copy was whole.
        execution.around.catalog._tools.clear()
        run_id = await start_on(execution, ann, agent="gated", value=str(tmp_path))
        await ann.end_of(run_id)
    events = await ann.log(run_id)
    assert [event.tool_executing.effect for event in events if event.HasField("tool_executing")] == [
        types_pb2.EFFECT_CLASS_KEYED
    ]


async def test_a_draining_executor_takes_no_new_stream(ann: Caller, settings: ExecutionSettings) -> None:
    async def nothing() -> AsyncIterator[pb.StartRunsRequest]:
        await asyncio.Event().wait()
        yield pb.StartRunsRequest()

    async with doomed(settings) as execution:
        await execution.drain(0)
        stream = execution.servicer.StartRuns(nothing(), None)  # type: ignore[arg-type]  # the context is not looked at
        with pytest.raises(MainspringError) as refused:
            await anext(stream)
    assert refused.value.reason_name == "DRAINING"


async def test_a_cancel_of_a_run_without_a_driver_is_carried_out(ann: Caller, settings: ExecutionSettings) -> None:
    await ann.register(scripted_agent("long", step("Hm.", call("diagnostics.sleep", seconds=60)), DONE))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="long")
        await ann.reached(run_id, "tool_executing")
    await ann.execution.CancelRun(pb.CancelRunRequest(run_id=run_id, reason="gone"), **ann.options())
    run = await ann.end_of(run_id)
    end = terminal(await ann.log(run_id))
    assert (run.state, end.reason) == (types_pb2.RUN_STATE_CANCELLED, "gone")
    assert [(receipt.call_id, receipt.acknowledged) for receipt in end.receipt] == [(f"{run_id}.2.0", True)]


async def test_a_run_that_could_not_be_taken_up_is_not_forgotten(
    ann: Caller, settings: ExecutionSettings, contract_databases: Mapping[str, Database]
) -> None:
    rows = Rows(contract_databases["State"].owner_url, {})
    await ann.register(scripted_agent("napping", step("Nap.", call("diagnostics.sleep", seconds=0.2)), DONE))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="napping")
        await ann.reached(run_id, "tool_executing")
        spoil = "UPDATE state.events SET event = $2 WHERE run_id = $1 AND seq = 1"
        (log,) = await rows.as_owner("SELECT event FROM state.events WHERE run_id = $1 AND seq = 1", run_id)
        await rows.as_owner(spoil, run_id, b"no event")
    await wait_until(partial(rows.as_owner, "SELECT FROM state.runs WHERE run_id = $1 AND epoch > 1", run_id))
    await wait_until(partial(rows.as_owner, "SELECT FROM state.leases WHERE run_id = $1 AND claim_seq > 0", run_id))
    with pytest.raises(grpc.RpcError):
        await ann.log(run_id)
    await rows.as_owner(spoil, run_id, log["event"])
    assert (await ann.end_of(run_id)).state == types_pb2.RUN_STATE_COMPLETED


async def test_twenty_runs_in_mid_call_all_go_on(ann: Caller, settings: ExecutionSettings) -> None:
    await ann.register(scripted_agent("napping", step("Nap.", call("diagnostics.sleep", seconds=0.5)), DONE))
    async with doomed(settings) as execution:
        run_ids = [await start_on(execution, ann, agent="napping") for _ in range(20)]
    for run_id in run_ids:
        assert (await ann.end_of(run_id)).state == types_pb2.RUN_STATE_COMPLETED
        assert names(await ann.log(run_id)).count("tool_completed") == 1


async def test_a_start_at_the_bound_of_an_executor_waits_in_line_for_whoever_has_room(
    ann: Caller, contract_environment: dict[str, Any]
) -> None:
    await ann.register(scripted_agent("brief", step("Hm.", delay="600ms"), DONE))
    async with doomed(ExecutionSettings(**contract_environment, runs_max=1)) as execution:
        first = await start_on(execution, ann, agent="brief")
        others = [await start_on(execution, ann, agent="brief") for _ in range(3)]
        runs = [await ann.end_of(run_id) for run_id in (first, *others)]
        assert {run.state for run in runs} == {types_pb2.RUN_STATE_COMPLETED}
        # Whoever begins a run at once does so under its first epoch.
        assert [run.epoch for run in runs] == [1, 2, 2, 2]


async def test_a_lapse_of_the_lease_while_a_run_is_created_lets_its_first_effect_ask_whose_it_is(
    ann: Caller,
    settings: ExecutionSettings,
    contract_databases: Mapping[str, Database],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with doomed(settings) as execution, asyncio.TaskGroup() as tasks:
        asked = caplog.text.count("StateService/GetRun")
        await tasks.create_task(start_on(execution, ann, agent="echo"))
        assert caplog.text.count("StateService/GetRun") == asked
        connection = await asyncpg.connect(contract_databases["State"].owner_url)
        async with connection.transaction():
            await connection.execute("LOCK TABLE state.runs IN EXCLUSIVE MODE")
            starting = tasks.create_task(start_on(execution, ann, agent="echo"))
            await wait_until(partial(is_waited_for, connection))
            execution.around.lease.lapses += 1
        await connection.close()
        run_id = await starting
        await wait_until(lambda: caplog.text.count("StateService/GetRun") > asked)
        assert (await ann.end_of(run_id)).state == types_pb2.RUN_STATE_COMPLETED


async def test_after_a_lapse_the_next_append_tells_whose_a_run_is(
    ann: Caller, settings: ExecutionSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    echo = call("diagnostics.echo", value=1)
    await ann.register(
        scripted_agent("lapsing", step("1", call("diagnostics.sleep", seconds=0.5)), step("2", echo), DONE)
    )
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="lapsing")
        await ann.reached(run_id, "tool_executing")
        asked = caplog.text.count("StateService/GetRun")
        execution.around.lease.lapses += 1
        await ann.reached(run_id, "agent_completed")
        assert caplog.text.count("StateService/GetRun") == asked


async def is_waited_for(connection: asyncpg.Connection[asyncpg.Record]) -> bool:
    """Whether a statement waits for a lock that somebody holds."""
    waiting: int = await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
    return waiting > 0
