"""What PostgreSQL holds of runs: that it outlives requests, users, sessions, processes, refused writes and load.

Segment: Enterprise
Business Goal: Platform stability
Value Impact: What an agent has done for a customer is never lost, mixed up or half written.
Strategic Impact: Durable and isolated history is what lets an enterprise put its own processes on the platform.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import orjson
import pytest

from test_framework.agents import Spec, call, echo_agent, scripted_agent, step
from test_framework.base_integration_test import BaseIntegrationTest
from test_framework.identities import make_context, unique
from test_framework.rows import check_gapless, holds
from test_framework.stack import Stack
from test_framework.user import User
from test_framework.websocket_client import Frame, check_log, types

pytestmark = [pytest.mark.integration, pytest.mark.real_services, pytest.mark.database]

CONCURRENT_USERS = 25
KINDS_OF_ECHO = ["agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_thinking"]


def historian() -> Spec:
    """Echoes its value through a tool and answers with it, and with what it sees of the session's earlier runs."""
    return scripted_agent(
        "historian",
        step("I will echo the value.", call("diagnostics.echo", value="{{input.value}}")),
        step("Done.", result={"answer": "{{calls[0].result.value}}", "earlier": "{{history}}"}),
    )


def remembered(run_id: str, ordinal: int, value: str, result: object) -> dict[str, object]:
    """A run as a later one of its session sees it."""
    return {"run_id": run_id, "ordinal": ordinal, "agent": "historian", "input": {"value": value}, "result": result}


def result_of(events: Sequence[Frame]) -> object:
    """The result on the completion; fails when the run did not complete."""
    check_log(events)
    assert events[-1]["type"] == "agent_completed", events[-1]
    return events[-1]["data"]["result"]


class TestAgentExecutionDatabase(BaseIntegrationTest):
    """Rows are read as the owner of the tables, so that row-level security can hide no mistake."""

    async def test_run_state_persists_across_requests(self, real_services_fixture: Stack) -> None:
        user = await self.open_user(real_services_fixture)
        await user.register(historian())
        session_id = user.context.session_id

        async with user.stream() as first_socket:
            first = await first_socket.run("historian", {"value": "first"}, session_id=session_id)
        async with user.stream() as second_socket:
            second = await second_socket.run("historian", {"value": "second"}, session_id=session_id)

        first_result = {"answer": "first", "earlier": []}
        first_id, second_id = first[0]["run_id"], second[0]["run_id"]
        second_result = {"answer": "second", "earlier": [remembered(first_id, 1, "first", first_result)]}
        assert result_of(first) == first_result
        assert result_of(second) == second_result
        rows = await user.stack.rows.runs(user.context)
        assert [(str(row["run_id"]), row["ordinal"], row["session_id"]) for row in rows] == [
            (first_id, 1, session_id),
            (second_id, 2, session_id),
        ]
        assert [orjson.loads(row["result"]) for row in rows] == [first_result, second_result]

    async def test_concurrent_users_transactions_are_isolated(self, real_services_fixture: Stack) -> None:
        tenant_id = unique("tenant")
        users = [await self.open_user(real_services_fixture, make_context(tenant_id)) for _ in range(2)]
        await users[0].register(historian())
        secrets = [unique("secret") for _ in users]

        async def run(user: User, secret: str) -> list[Frame]:
            async with user.stream() as socket:
                return await socket.run("historian", {"value": secret}, session_id=user.context.session_id)

        logs = await asyncio.gather(*(run(user, secret) for user, secret in zip(users, secrets, strict=True)))

        assert [result_of(log) for log in logs] == [{"answer": secret, "earlier": []} for secret in secrets]
        ids = [identifier for log in logs for identifier in {log[0]["run_id"], log[0]["session_id"], *(_call_ids(log))}]
        assert len(ids) == len(set(ids)) == 6
        for user, log, own, foreign in zip(users, logs, secrets, reversed(secrets), strict=True):
            runs = await user.stack.rows.runs(user.context)
            events = await user.stack.rows.events(log[0]["run_id"])
            assert len(runs) == 1
            check_gapless(events)
            assert holds(runs, own) and holds(events, own)
            assert not holds(runs, foreign) and not holds(events, foreign)

    async def test_new_session_recovers_earlier_state(self, private_stack: Stack) -> None:
        before = User(private_stack, make_context())
        session_id = before.context.session_id
        await before.register(historian())
        async with before.stream() as socket:
            logs = [await socket.run("historian", {"value": value}, session_id=session_id) for value in ("one", "two")]
        run_ids = [log[0]["run_id"] for log in logs]
        bodies = [await _raw_history(before, run_id) for run_id in run_ids]
        results = [row["result"] for row in await private_stack.rows.runs(before.context)]
        await before.close()
        await private_stack.kill("execution")

        after = await self.open_user(private_stack, make_context(before.context.tenant_id, before.context.user_id))
        assert [await _raw_history(after, run_id) for run_id in run_ids] == bodies
        assert [row["result"] for row in await private_stack.rows.runs(after.context)] == results
        await private_stack.wait_ready()
        async with after.stream() as socket:
            third = await socket.run("historian", {"value": "three"}, session_id=session_id)

        earlier = [
            remembered(run_id, ordinal, value, orjson.loads(result))
            for ordinal, (run_id, value, result) in enumerate(zip(run_ids, ("one", "two"), results, strict=True), 1)
        ]
        assert result_of(third) == {"answer": "three", "earlier": earlier}

    async def test_failed_result_write_rolls_back_everything(self, real_services_fixture: Stack) -> None:
        user = await self.open_user(real_services_fixture)
        await user.register(echo_agent())
        poison = unique("poison")
        constraint = f"refuse_{poison.replace('-', '_')}"
        # Only the terminal append writes a result, so that exactly its statement fails, and only for this input.
        await user.stack.rows.execute(
            f"ALTER TABLE state.runs ADD CONSTRAINT {constraint} "
            f"CHECK (result IS NULL OR position('{poison}'::bytea IN result) = 0) NOT VALID"
        )
        self.add_cleanup(lambda: user.stack.rows.execute(f"ALTER TABLE state.runs DROP CONSTRAINT {constraint}"))

        async with user.stream() as socket:
            refused = await socket.run("echo", {"value": poison})
            accepted = await socket.run("echo", {"value": "wholesome"})

        check_log(refused)
        assert refused[-1]["type"] == "agent_failed"
        assert refused[-1]["data"]["error"]["reason"] == "EVENT_REFUSED"
        run_id = refused[0]["run_id"]
        run, events = await user.stack.rows.run(run_id), await user.stack.rows.events(run_id)
        check_gapless(events)
        assert len(events) == len(refused) == run["last_seq"]
        assert run["result"] is None
        # The result was to be written with the events of its append: none of them holds it, in any column.
        assert not holds(events[-1:], poison) and "agent_completed" not in types(refused)
        assert not holds([run], f'"answer":"{poison}"') and not holds(events, f'"answer":"{poison}"')
        assert result_of(accepted) == {"answer": "wholesome"}
        row = await user.stack.rows.run(accepted[0]["run_id"])
        assert orjson.loads(row["result"]) == {"answer": "wholesome"}

    async def test_persistence_under_concurrent_load(self, real_services_fixture: Stack) -> None:
        tenant_id = unique("tenant")
        users = [await self.open_user(real_services_fixture, make_context(tenant_id)) for _ in range(CONCURRENT_USERS)]
        await users[0].register(echo_agent())

        async def run(user: User) -> list[Frame]:
            async with user.stream() as socket:
                return await socket.run("echo", {"value": user.context.user_id})

        logs = await asyncio.gather(*(run(user) for user in users))

        assert [result_of(log) for log in logs] == [{"answer": user.context.user_id} for user in users]
        rows = await real_services_fixture.rows.as_owner(
            "SELECT run_id, user_id, result FROM state.runs WHERE tenant_id = $1", tenant_id
        )
        assert {(str(row["run_id"]), row["user_id"], row["result"]) for row in rows} == {
            (
                log[0]["run_id"],
                user.context.user_id,
                json.dumps({"answer": user.context.user_id}, separators=(",", ":")).encode(),
            )
            for log, user in zip(logs, users, strict=True)
        }
        for log in logs:
            events = await real_services_fixture.rows.events(log[0]["run_id"])
            check_gapless(events)
            assert len(events) == len(log) == len(KINDS_OF_ECHO) + 1

    async def test_consistency_over_sequential_runs(self, real_services_fixture: Stack) -> None:
        user = await self.open_user(real_services_fixture)
        await user.register(historian())
        values = ["red", "green", "blue"]

        async with user.stream() as socket:
            logs = [
                await socket.run("historian", {"value": value}, session_id=user.context.session_id) for value in values
            ]

        earlier: list[object] = []
        for ordinal, (log, value) in enumerate(zip(logs, values, strict=True), 1):
            result = {"answer": value, "earlier": list(earlier)}
            assert types(log) == [*KINDS_OF_ECHO, "agent_completed"]
            assert log[0]["data"]["ordinal"] == ordinal
            assert result_of(log) == result
            row, events = await user.stack.rows.run(log[0]["run_id"]), await user.stack.rows.events(log[0]["run_id"])
            check_gapless(events)
            assert (row["ordinal"], row["last_seq"]) == (ordinal, len(events))
            assert orjson.loads(row["result"]) == result
            earlier.append(remembered(log[0]["run_id"], ordinal, value, result))


def _call_ids(log: Sequence[Frame]) -> list[str]:
    return [event["data"]["call_id"] for event in log if event["type"] == "tool_executing"]


async def _raw_history(user: User, run_id: str) -> bytes:
    answer = await user.http("GET", f"/v1/runs/{run_id}/events")
    assert answer.status == 200, answer
    return answer.body
