"""What becomes of a run from its start to its release: in order, on record, with nothing held that is not needed.

Segment: Enterprise
Business Goal: Resource management
Value Impact: An agent that waits, is stopped or dies with its process costs nothing and blocks nobody.
Strategic Impact: Predictable lifecycles let an enterprise plan capacity and prove what its agents did.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from statistics import median

import orjson
import pytest
from mainspring.v1 import events_pb2, execution_pb2, state_pb2
from mainspring_kit.identity import new_id

from test_framework.agents import Spec, call, echo_agent, scripted_agent, step
from test_framework.base_integration_test import BaseIntegrationTest
from test_framework.gate import Gate, gated_agent
from test_framework.identities import make_context, unique
from test_framework.rows import Row, check_gapless
from test_framework.stack import PROCESSES, Stack
from test_framework.user import User
from test_framework.waiting import wait_until
from test_framework.websocket_client import Frame, check_log, types

pytestmark = [pytest.mark.integration, pytest.mark.real_services]

STAGES = ["initialization", "preprocessing", "core_execution", "postprocessing", "completion"]
RUNNING, WAITING, PAUSED, COMPLETED, FAILED, CANCELLED = 2, 3, 4, 5, 6, 7
RUNS_AT_ONCE = 10


def signalled_agent() -> Spec:
    """Goes through the gate of `input.gate`, then waits for the signal `go`; its result is what that brings."""
    return scripted_agent(
        "signalled",
        step("Through the gate.", call("probe.gate", folder="{{input.gate}}")),
        step("Now I wait.", call("run.wait_for_signal", name="go")),
        step("It came.", result={"answer": "{{calls[1].result.data}}"}),
    )


async def in_state(stack: Stack, run_id: str, state: int) -> Row:
    """The run's row, once it is in a state."""

    async def found() -> Row:
        row = await stack.rows.run(run_id)
        return row if row["state"] == state else {}

    return await wait_until(found, what=f"state {state} of run {run_id}")


async def held(stack: Stack, run_id: str) -> dict[str, int]:
    """What the platform keeps for a run that is under way: how many rows of each kind."""
    counts = {}
    for table in ("leases", "ready"):
        found = await stack.rows.as_owner(f"SELECT FROM state.{table} WHERE run_id = $1::text::uuid", run_id)
        counts[table] = len(found)
    lines = "SELECT FROM state.sessions WHERE head_run_id = $1::text::uuid"
    return {**counts, "line": len(await stack.rows.as_owner(lines, run_id))}


async def event_types(stack: Stack, run_id: str) -> list[str]:
    """The kinds of the run's events, as the table has them, checked to be gapless."""
    events = await stack.rows.events(run_id)
    check_gapless(events)
    return [event["type"] for event in events]


class TestAgentLifecycle(BaseIntegrationTest):
    """Rows are read as the owner of the tables, so that row-level security can hide no mistake."""

    async def test_full_lifecycle_is_persisted(self, real_services_fixture: Stack, tmp_path: Path) -> None:
        user, stack, gate = await self.open_user(real_services_fixture), real_services_fixture, Gate(tmp_path)
        await user.register(signalled_agent())
        async with user.stream() as socket:
            run_id = await socket.start("signalled", {"gate": gate.path})
            await gate.wait_for(1)
            assert await held(stack, run_id) == {"leases": 1, "ready": 0, "line": 1}

            gate.open()
            await in_state(stack, run_id, WAITING)
            assert await held(stack, run_id) == {"leases": 0, "ready": 1, "line": 1}  # only its deadline is noted

            assert (await socket.ask("signal", run_id=run_id, name="go", data=7))["op"] == "ok"
            events = await socket.ended(run_id)

        check_log(events)
        assert events[-1]["data"]["result"] == {"answer": 7}
        row = await in_state(stack, run_id, COMPLETED)
        logged = await stack.rows.events(run_id)
        # Two clocks: the database's for the row, and that of the process which writes the log.
        of_row = [row[name] for name in ("create_time", "start_time", "end_time", "released_time")]
        of_log = [event["event_time"] for event in logged]
        assert of_row == sorted(of_row) and of_log == sorted(of_log)
        assert len(of_log) > 6
        assert [event["type"] for event in logged] == types(events)
        assert {"agent_started", "agent_waiting", "signal_received", "agent_completed"} <= set(types(events))
        stages = orjson.loads(row["stages"])
        assert [stage["name"] for stage in stages] == STAGES
        assert all(stage["duration_ms"] > 0 for stage in stages)
        assert await held(stack, run_id) == {"leases": 0, "ready": 0, "line": 0}

    async def test_transitions_follow_the_allowed_order(self, real_services_fixture: Stack, tmp_path: Path) -> None:
        user, stack, gate = await self.open_user(real_services_fixture), real_services_fixture, Gate(tmp_path)
        await user.register(gated_agent())
        async with user.stream() as socket:
            run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
            await gate.wait_for(1)
            refusal = await socket.ask("resume", run_id=run_id)
            assert (refusal["op"], refusal["code"]) == ("error", "FAILED_PRECONDITION")
            assert refusal["reason"] == "TRANSITION_ILLEGAL"

            assert (await socket.ask("pause", run_id=run_id))["op"] == "ok"
            gate.open()
            row = await in_state(stack, run_id, PAUSED)
            assert (await socket.ask("pause", run_id=run_id))["reason"] == "TRANSITION_ILLEGAL"
            # Not even who speaks as an executor, with the right epoch and seq, completes a run that is paused.
            answer = await _append_completed(user, row)
            assert (answer.status.code, answer.state) == (9, 0), answer

            assert (await socket.ask("resume", run_id=run_id))["op"] == "ok"
            events = await socket.ended(run_id)
            refusal = await socket.ask("cancel", run_id=run_id)
            assert (refusal["code"], refusal["reason"]) == ("FAILED_PRECONDITION", "RUN_ENDED")

        check_log(events)
        states = [kind for kind in types(events) if kind.startswith("agent_") and kind != "agent_thinking"]
        assert states == ["agent_started", "agent_paused", "agent_resumed", "agent_completed"]
        assert await event_types(stack, run_id) == types(events)

    async def test_cleanup_releases_resources_and_is_idempotent(self, real_services_fixture: Stack) -> None:
        user, stack = await self.open_user(real_services_fixture), real_services_fixture
        held_up = [call("diagnostics.sleep", seconds=60), call("human.approve", title="Go on?")]
        await user.register(scripted_agent("busy", step("Hold.", *held_up), step("Done.", result=1)))
        async with user.stream() as socket:
            run_id = await socket.start("busy", {})
            await socket.until(run_id, "approval_requested")
            execution = await user.grpc_stub("Execution")
            request = execution_pb2.CancelRunRequest(run_id=run_id, request_id=new_id(), reason="enough")
            for _ in range(3):
                await execution.CancelRun(request, metadata=user.metadata(), timeout=10)
            events = await socket.ended(run_id)

        check_log(events)
        row = await in_state(stack, run_id, CANCELLED)
        assert await held(stack, run_id) == {"leases": 0, "ready": 0, "line": 0}
        assert types(events)[-1] == "agent_cancelled"
        assert sorted(types(events)[-4:-1]) == ["approval_resolved", "tool_completed", "tool_completed"]
        (receipt,) = events[-1]["data"]["receipt"]
        assert receipt["acknowledged"] is True
        # Once more, after all is done: nothing of it changes.
        answer = await user.http("POST", f"/v1/runs/{run_id}:cancel", {})
        assert (answer.status, answer.json["reason"]) == (409, "RUN_ENDED")
        assert await stack.rows.run(run_id) == row
        assert await event_types(stack, run_id) == types(events)

        order: list[str] = []
        inner = BaseIntegrationTest()
        inner._cleanups = []
        for name in ("first", "second", "third"):
            inner.add_cleanup(lambda name=name: order.append(name))  # type: ignore[misc]  # the default has its type
        for _ in range(2):
            await inner._end()
        assert order == ["third", "second", "first"]

    async def test_lifecycle_history_survives_restart(self, private_stack: Stack, tmp_path: Path) -> None:
        user, gate = await self.open_user(private_stack), Gate(tmp_path)
        await user.register(signalled_agent(), gated_agent())
        gate.open()
        async with user.stream() as socket:
            ended = await socket.run("gated", {"gate": gate.path, "value": 1})
            waiting_id = await socket.start("signalled", {"gate": gate.path})
            await in_state(private_stack, waiting_id, WAITING)
        run_ids = [ended[0]["run_id"], waiting_id]
        before = [(await private_stack.rows.run(run_id), await _history(user, run_id)) for run_id in run_ids]

        for name in ("execution", "state"):
            await private_stack.restart(name)
        await private_stack.wait_ready()

        assert [(await private_stack.rows.run(run_id), await _history(user, run_id)) for run_id in run_ids] == before
        async with user.stream() as socket:
            assert (await socket.ask("signal", run_id=waiting_id, name="go", data="late"))["op"] == "ok"
            await socket.follow(waiting_id)
            events = await socket.ended(waiting_id)
        check_log(events)
        assert events[-1]["data"]["result"] == {"answer": "late"}
        assert "run_recovered" not in types(events)

    async def test_concurrent_lifecycles_are_independent(self, real_services_fixture: Stack, tmp_path: Path) -> None:
        stack, tenant_id = real_services_fixture, unique("tenant")
        users = [await self.open_user(stack, make_context(tenant_id)) for _ in range(4)]
        await users[0].register(signalled_agent())
        gate = Gate(tmp_path)
        gate.open()
        sockets = [await user.open_stream() for user in users]
        run_ids = [await socket.start("signalled", {"gate": gate.path}) for socket in sockets]
        for run_id in run_ids:
            await in_state(stack, run_id, WAITING)

        answered, cancelled, paused, left = zip(sockets, run_ids, strict=True)
        assert (await answered[0].ask("signal", run_id=answered[1], name="go", data="mine"))["op"] == "ok"
        assert (await cancelled[0].ask("cancel", run_id=cancelled[1]))["op"] == "ok"
        assert (await paused[0].ask("pause", run_id=paused[1]))["op"] == "ok"
        # What is somebody else's is not there at all.
        foreign = await answered[0].ask("signal", run_id=left[1], name="go", data="stray")
        assert foreign["reason"] == "RUN_NOT_FOUND"

        first, second = await answered[0].ended(answered[1]), await cancelled[0].ended(cancelled[1])
        await in_state(stack, paused[1], PAUSED)
        check_log(first)
        check_log(second)
        assert first[-1]["data"]["result"] == {"answer": "mine"}
        assert types(second)[-2:] == ["tool_completed", "agent_cancelled"]
        assert (await stack.rows.run(left[1]))["state"] == WAITING
        for socket, run_id in (paused, left):
            await socket.ask("cancel", run_id=run_id)
            check_log(await socket.ended(run_id))
        for user, run_id in zip(users, run_ids, strict=True):
            assert [str(row["run_id"]) for row in await stack.rows.runs(user.context)] == [run_id]
            assert await held(stack, run_id) == {"leases": 0, "ready": 0, "line": 0}

    async def test_failure_is_recorded_and_new_agent_recovers(self, real_services_fixture: Stack) -> None:
        user, stack = await self.open_user(real_services_fixture), real_services_fixture
        broken = step("Look.", call("diagnostics.fail", code="INTERNAL", message="no disk"))
        await user.register(scripted_agent("fragile", broken, step("So.", result="{{calls[0].result}}")))
        session_id = user.context.session_id
        async with user.stream() as socket:
            failed = await socket.run("fragile", {"value": 1}, session_id=session_id)
            run_id = failed[0]["run_id"]
            assert await held(stack, run_id) == {"leases": 0, "ready": 0, "line": 0}
            await user.register(echo_agent("fragile"))
            mended = await socket.run("fragile", {"value": 2}, session_id=session_id)

        check_log(failed)
        assert failed[-1]["type"] == "agent_failed"
        row = await in_state(stack, run_id, FAILED)
        error = orjson.loads(row["error"])
        assert (error["reason"], error["message"]) == ("TOOL_FAILED", "no disk")
        assert row["released_time"] >= row["end_time"]
        check_log(mended)
        assert mended[-1]["data"]["result"] == {"answer": 2}
        assert [row["agent_version"] for row in await stack.rows.runs(user.context)] == ["1", "2"]

    async def test_lifecycle_overhead_is_stable(self, real_services_fixture: Stack) -> None:
        user, stack = await self.open_user(real_services_fixture), real_services_fixture
        await user.register(echo_agent())
        async with user.stream() as socket:

            async def cost_of_ten() -> float:
                before = stack.cpu_seconds(*PROCESSES)
                for _ in range(RUNS_AT_ONCE):
                    check_log(await socket.run("echo", {"value": 1}))
                return stack.cpu_seconds(*PROCESSES) - before

            first, *later = [await cost_of_ten() for _ in range(8)]
        assert median(later) <= 1.5 * first, (first, later)

    async def test_orphaned_run_is_taken_over_after_kill(self, private_stack: Stack, tmp_path: Path) -> None:
        user, gate = await self.open_user(private_stack), Gate(tmp_path)
        await user.register(gated_agent())
        async with user.stream() as socket:
            run_id = await socket.start("gated", {"gate": gate.path, "value": "kept"})
            await gate.wait_for(1)
            (former,) = private_stack.pids["execution"]
            (lease,) = await private_stack.rows.as_owner("SELECT executor_id FROM state.leases")

            await private_stack.kill("execution")
            recovered = await socket.until(run_id, "run_recovered")
            gate.open()
            events = await socket.ended(run_id)

        check_log(events)
        assert private_stack.pids["execution"] != [former]
        assert recovered["data"]["executor"] != lease["executor_id"]
        assert recovered["data"]["lost_calls"] == gate.effects() == [events[-1]["data"]["result"]["call_id"]]
        assert await event_types(private_stack, run_id) == types(events)
        assert await held(private_stack, run_id) == {"leases": 0, "ready": 0, "line": 0}
        assert await private_stack.redis_keys(run_id) == []


async def _history(user: User, run_id: str) -> list[Frame]:
    answer = await user.http("GET", f"/v1/runs/{run_id}/events")
    assert answer.status == 200, answer
    events: list[Frame] = answer.json["events"]
    return events


async def _append_completed(user: User, row: Row) -> state_pb2.AppendResult:
    """What state answers to the completion of a run, from somebody who knows all that its holder knew."""
    run_id, seq = str(row["run_id"]), row["last_seq"]
    completed = events_pb2.RunEvent(run_id=run_id, seq=seq + 1, agent_completed=events_pb2.AgentCompleted(result=b"1"))
    append = state_pb2.Append(
        item_id=1,
        append_id=new_id(),
        tenant_id=row["tenant_id"],
        run_id=run_id,
        expected_seq=seq,
        epoch=row["epoch"],
        events=[completed],
    )
    stub = await user.grpc_stub("State")
    stream = stub.Append(metadata=user.stack.identities.service_metadata())
    await stream.write(state_pb2.AppendRequest(appends=[append]))
    async with asyncio.timeout(10):
        async for response in stream:
            for result in response.results:
                stream.cancel()
                return state_pb2.AppendResult.FromString(result.SerializeToString())
    raise AssertionError("state has not answered")
