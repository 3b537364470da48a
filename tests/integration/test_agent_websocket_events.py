"""What a user sees of a run while it happens: every event, once, in order, only the user's own, and again later.

Segment: Free and Early
Business Goal: User experience
Value Impact: People watch their agent work and get a result they can act on, instead of waiting before a blank page.
Strategic Impact: A live and truthful view of each step is what turns a trial into daily use.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from test_framework.agents import Spec, call, echo_agent, scripted_agent, step
from test_framework.base_integration_test import BaseIntegrationTest
from test_framework.identities import make_context, unique
from test_framework.stack import Stack
from test_framework.user import User
from test_framework.websocket_client import Frame, check_log, types

pytestmark = [pytest.mark.integration, pytest.mark.real_services, pytest.mark.websocket]

CONCURRENT_USERS = 20
FIVE = {"agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed"}
MONTHLY_COSTS = {"compute": 1200.0, "storage": 300.0, "traffic": 150.0}
CUTS = {"compute": 0.25, "storage": 0.4, "traffic": 0.1}


def three_step_agent() -> Spec:
    """Three thinking steps, two different tools."""
    return scripted_agent(
        "three-steps",
        step("First I look.", call("diagnostics.echo", value="{{input.value}}")),
        step("Then I wait a little.", call("diagnostics.sleep", seconds=0.01)),
        step("That is it.", result={"answer": "{{calls[0].result.value}}"}),
    )


def failing_agent() -> Spec:
    """Thinks, calls a tool, and then its model fails for good."""
    return scripted_agent(
        "failing",
        step("I begin.", call("diagnostics.echo", value=1)),
        step("", fail={"code": "INTERNAL", "message": "the model has lost its thread"}),
    )


def optimizer_agent() -> Spec:
    """Reads the costs, lets a tool estimate what can be saved, and answers with figures and recommendations."""
    return scripted_agent(
        "optimizer",
        step("I read the bill of {{input.customer}}.", call("diagnostics.echo", costs="{{input.costs}}")),
        step(
            "I estimate what can be saved.",
            call("probe.estimate", costs="{{calls[0].result.costs}}", cuts="{{input.cuts}}"),
        ),
        step("I have what I need.", result="{{calls[1].result}}"),
    )


def kinds_by_call(events: Sequence[Frame]) -> dict[str, list[str]]:
    """The types of each tool call's events, in order."""
    kinds: dict[str, list[str]] = {}
    for event in events:
        if event["type"].startswith("tool_"):
            kinds.setdefault(event["data"]["call_id"], []).append(event["type"])
    return kinds


class TestAgentWebsocketEvents(BaseIntegrationTest):
    """Frames are what a real socket of the gateway received."""

    async def test_all_five_events_reach_the_client_in_order(self, real_services_fixture: Stack) -> None:
        user = await self.open_user(real_services_fixture)
        await user.register(three_step_agent())

        async with user.stream() as socket:
            events = await socket.run("three-steps", {"value": 42})

        check_log(events)
        assert types(events) == [
            "agent_started",
            *["agent_thinking", "tool_executing", "tool_completed"] * 2,
            "agent_thinking",
            "agent_completed",
        ]
        assert list(kinds_by_call(events).values()) == [["tool_executing", "tool_completed"]] * 2
        assert [event["data"]["tool"] for event in events if event["type"] == "tool_executing"] == [
            "diagnostics.echo",
            "diagnostics.sleep",
        ]
        assert [event["data"]["step"] for event in events if event["type"] == "agent_thinking"] == [1, 2, 3]
        assert events[-1]["data"]["result"] == {"answer": 42}

    async def test_events_never_cross_users(self, real_services_fixture: Stack) -> None:
        tenant_id = unique("tenant")
        users = [await self.open_user(real_services_fixture, make_context(tenant_id)) for _ in range(2)]
        secrets = [unique("secret") for _ in users]
        await users[0].register(three_step_agent())
        sockets = [await user.open_stream() for user in users]

        run_ids = await asyncio.gather(
            *(
                socket.start("three-steps", {"value": secret}, session_id=user.context.session_id)
                for socket, user, secret in zip(sockets, users, secrets, strict=True)
            )
        )
        await asyncio.gather(*(socket.ended(run_id) for socket, run_id in zip(sockets, run_ids, strict=True)))
        # Each answer is behind whatever the gateway had for the socket before it.
        await asyncio.gather(*(socket.ask("ping") for socket in sockets))

        assert sockets[0].welcome["user_id"] != sockets[1].welcome["user_id"]
        for socket, user, run_id, own, foreign in zip(sockets, users, run_ids, secrets, reversed(secrets), strict=True):
            assert socket.welcome["user_id"] == user.context.user_id
            check_log(socket.events())
            assert set(types(socket.events())) == FIVE
            assert {event["run_id"] for event in socket.events()} == {run_id}
            assert {event["session_id"] for event in socket.events()} == {user.context.session_id}
            assert own in repr(socket.frames)
            assert foreign not in repr(socket.frames)

    async def test_event_stream_is_durable_and_replayable(self, private_stack: Stack) -> None:
        user = await self.open_user(private_stack)
        await user.register(three_step_agent())
        async with user.stream() as socket:
            live = await socket.run("three-steps", {"value": "kept"})
        check_log(live)

        assert await self._replay(user, live[0]["run_id"]) == live
        await private_stack.flush_redis()
        assert await self._replay(user, live[0]["run_id"]) == live

    async def test_failure_emits_started_then_error(self, real_services_fixture: Stack) -> None:
        user = await self.open_user(real_services_fixture)
        await user.register(failing_agent(), echo_agent())

        async with user.stream() as socket:
            failed = await socket.run("failing", {})
            # What came after the end would be here by the time a whole later run is.
            await socket.run("echo", {"value": "afterwards"})
            everything = socket.events(failed[0]["run_id"])

        check_log(everything)
        assert types(everything) == [
            "agent_started",
            "agent_thinking",
            "tool_executing",
            "tool_completed",
            "agent_failed",
        ]
        error = everything[-1]["data"]["error"]
        assert (error["code"], error["reason"]) == ("INTERNAL", "MODEL_FAILED")
        assert "the model has lost its thread" in error["message"]
        rows = await user.stack.rows.events(failed[0]["run_id"])
        assert len(rows) == len(everything)

    async def test_event_delivery_under_concurrent_users(self, real_services_fixture: Stack) -> None:
        tenant_id = unique("tenant")
        users = [await self.open_user(real_services_fixture, make_context(tenant_id)) for _ in range(CONCURRENT_USERS)]
        await users[0].register(three_step_agent())
        sockets = [await user.open_stream() for user in users]

        logs = await asyncio.gather(
            *(
                socket.run("three-steps", {"value": user.context.user_id})
                for socket, user in zip(sockets, users, strict=True)
            )
        )
        await asyncio.gather(*(socket.ask("ping") for socket in sockets))

        for socket, user, log in zip(sockets, users, logs, strict=True):
            check_log(log)
            assert log[-1]["data"]["result"] == {"answer": user.context.user_id}
            delivered = Counter((event["run_id"], event["seq"]) for event in socket.events())
            stored = await user.stack.rows.events(log[0]["run_id"])
            assert delivered == Counter((str(row["run_id"]), row["seq"]) for row in stored)

    async def test_events_carry_business_payload(self, real_services_fixture: Stack) -> None:
        user = await self.open_user(real_services_fixture)
        await user.register(optimizer_agent())

        async with user.stream() as socket:
            events = await socket.run("optimizer", {"customer": "Acme", "costs": MONTHLY_COSTS, "cuts": CUTS})

        check_log(events)
        by_type: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            by_type.setdefault(event["type"], []).append(event["data"])
        assert [data["text"] for data in by_type["agent_thinking"]] == [
            "I read the bill of Acme.",
            "I estimate what can be saved.",
            "I have what I need.",
        ]
        assert [(data["tool"], data["arguments"]) for data in by_type["tool_executing"]] == [
            ("diagnostics.echo", {"costs": MONTHLY_COSTS}),
            ("probe.estimate", {"costs": MONTHLY_COSTS, "cuts": CUTS}),
        ]
        assert [(data["tool"], data["status"]) for data in by_type["tool_completed"]] == [
            ("diagnostics.echo", "ok"),
            ("probe.estimate", "ok"),
        ]
        result = by_type["agent_completed"][0]["result"]
        saved = sum(cost * CUTS[name] for name, cost in MONTHLY_COSTS.items())
        assert result["impact"] == {"monthly_saving_usd": saved, "share": saved / sum(MONTHLY_COSTS.values())}
        assert 0.0 < result["confidence"] <= 1.0
        assert [entry["area"] for entry in result["recommendations"]] == ["compute", "storage", "traffic"]
        assert [entry["saving_usd"] for entry in result["recommendations"]] == [300.0, 120.0, 15.0]

    async def _replay(self, user: User, run_id: str) -> list[Frame]:
        async with user.stream() as socket:
            await socket.follow(run_id, after_seq=0)
            return await socket.ended(run_id)
