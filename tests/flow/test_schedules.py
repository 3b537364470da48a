"""Schedules start runs of the user who put them, each time once, whoever of the registry's processes dies meanwhile."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mainspring.v1 import registry_pb2

from test_framework.agents import echo_agent, scripted_agent, step
from test_framework.user import User
from test_framework.waiting import wait_until

pytestmark = [pytest.mark.flow, pytest.mark.real_services]

replicas = {"registry": 2}
RUNS = 3


async def put(user: User, **fields: object) -> registry_pb2.Schedule:
    """Puts a schedule of each second, as an admin."""
    spec = {"apiVersion": "mainspring/v1", "kind": "Schedule", "name": "often", "cron": "* * * * * *", **fields}
    stub = await user.grpc_stub("Registry")
    request = registry_pb2.PutScheduleRequest(document=json.dumps(spec).encode())
    response: registry_pb2.PutScheduleResponse = await stub.PutSchedule(request, metadata=admin(user), timeout=20)
    return response.schedule


def admin(user: User) -> tuple[tuple[str, str], ...]:
    """The metadata of the user as an admin."""
    token = user.stack.identities.token(user.context.tenant_id, user.context.user_id, "admin")
    return (("authorization", f"Bearer {token}"),)


async def read(user: User, *, replica: int = 0) -> registry_pb2.Schedule:
    """The schedule as it is."""
    stub = await user.grpc_stub("Registry", replica)
    request = registry_pb2.GetScheduleRequest(name="often")
    response: registry_pb2.GetScheduleResponse = await stub.GetSchedule(request, metadata=admin(user), timeout=20)
    return response.schedule


async def runs(user: User) -> list[dict[str, Any]]:
    """The user's runs, newest first; Any: JSON objects."""
    answer = await user.http("GET", "/v1/runs")
    found: list[dict[str, Any]] = answer.json["runs"]
    return found


async def test_each_time_starts_one_run_also_when_a_process_dies(user: User) -> None:
    await user.register(echo_agent("ticks"))
    await put(user, agent="ticks", input={"value": 7})

    async def several() -> list[dict[str, Any]]:
        found = [run for run in await runs(user) if run["state"] == "COMPLETED"]
        return found if len(found) >= RUNS else []

    before = await wait_until(several, what=f"{RUNS} runs that a schedule started")
    await user.stack.kill("registry", index=0)
    await user.stack.wait_ready()

    async def more() -> list[dict[str, Any]]:
        found = [run for run in await runs(user) if run["state"] == "COMPLETED"]
        return found if len(found) >= len(before) + RUNS else []

    after = await wait_until(more, 45, what="runs after a registry process was killed")
    # A run is of one session, one after the other; no time started two.
    assert {run["session_id"] for run in after} == {"schedule:often:enqueue"}
    assert all(run["result"] == {"answer": 7} for run in after)
    keys = await user.stack.rows.as_owner(
        "SELECT idempotency_key, run_id FROM state.idempotency_keys WHERE tenant_id = $1", user.context.tenant_id
    )
    assert len({row["idempotency_key"] for row in keys}) == len({row["run_id"] for row in keys}) >= len(after)
    assert (await read(user)).last_run_id in {str(row["run_id"]) for row in keys}


async def test_a_run_that_may_not_overlap_is_left_out_and_told(user: User) -> None:
    await user.register(scripted_agent("slow", step("Slowly.", delay="20s"), step("Done.", result={"ok": True})))
    await put(user, agent="slow", overlap="reject")

    async def refused() -> str:
        return (await read(user)).last_error.reason

    assert await wait_until(refused, what="a start that the session's policy refuses") == "SESSION_BUSY"
    assert len(await runs(user)) == 1


async def test_schedules_are_put_shown_and_deleted_over_http(user: User) -> None:
    spec = {
        "apiVersion": "mainspring/v1",
        "kind": "Schedule",
        "name": "yearly",
        "cron": "0 0 1 1 *",
        "agent": "missing",
    }
    refused = await user.http("POST", "/v1/schedules", spec, role="operator")
    assert (refused.status, refused.json["reason"]) == (403, "ROLE_REQUIRED")
    stored = await user.http("POST", "/v1/schedules", spec, role="admin")
    assert stored.status == 200, stored.body
    assert (stored.json["missed"], stored.json["overlap"], stored.json["time_zone"]) == ("once", "enqueue", "UTC")
    shown = await user.http("GET", "/v1/schedules/yearly", role="operator")
    listed = await user.http("GET", "/v1/schedules", role="operator")
    assert listed.json == {"schedules": [shown.json], "next_page_token": ""}
    assert shown.json["next_time"].endswith("-01-01T00:00:00.000Z")
    assert (await user.http("DELETE", "/v1/schedules/yearly", role="admin")).status == 200
    gone = await user.http("GET", "/v1/schedules/yearly", role="operator")
    assert (gone.status, gone.json["reason"]) == (404, "SCHEDULE_NOT_FOUND")


async def test_an_agent_that_is_not_there_is_told_and_the_schedule_goes_on(user: User) -> None:
    await put(user, agent="missing")

    async def refused_twice() -> bool:
        found = await read(user)
        return found.last_error.reason == "AGENT_NOT_FOUND" and found.next_time.seconds > first.next_time.seconds + 1

    first = await read(user)
    await wait_until(refused_twice, what="an error that is kept, and a next time")
    assert not await runs(user)
