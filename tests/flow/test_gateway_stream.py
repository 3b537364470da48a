"""Starts, follows and ends of runs through the gateway, by socket, HTTP and event stream, on a stack of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from mainspring_kit.identity import new_id

from test_framework.agents import echo_agent
from test_framework.gate import Gate, gated_agent
from test_framework.identities import unique
from test_framework.user import User
from test_framework.waiting import wait_until
from test_framework.websocket_client import Frame, StreamClient, check_log, types

pytestmark = [pytest.mark.flow, pytest.mark.websocket, pytest.mark.real_services]

LARGE = 200_000


@pytest.fixture
async def ready_user(user: User) -> User:
    """A user whose tenant has the agents."""
    await user.register(echo_agent(), gated_agent())
    return user


@pytest.fixture
async def socket(ready_user: User) -> AsyncIterator[StreamClient]:
    async with ready_user.stream() as client:
        yield client


async def caught_up(client: StreamClient, run_id: str) -> Frame:
    return await client.wait_for(lambda frame: frame["op"] == "caught_up" and frame["run_id"] == run_id, "caught_up")


async def test_a_start_is_answered_and_followed_from_its_first_event(socket: StreamClient) -> None:
    session_id = unique("session")
    answer = await socket.ask("start", agent="echo", input={"value": "hello"}, session_id=session_id)
    assert (answer["op"], answer["state"]) == ("started", "RUNNING")
    events = await socket.ended(answer["run_id"])
    check_log(events)
    assert {event["session_id"] for event in events} == {session_id}
    assert {event["agent"] for event in events} == {"echo"}
    assert len({event["trace_id"] for event in events}) == 1
    assert events[0]["data"]["input"] == {"value": "hello"}
    assert events[-1]["data"]["result"] == {"answer": "hello"}


async def test_a_refused_start_leaves_the_socket_as_it_was(socket: StreamClient) -> None:
    answer = await socket.ask("start", agent="nobody", input={})
    assert (answer["op"], answer["code"], answer["reason"]) == ("error", "NOT_FOUND", "AGENT_NOT_FOUND")
    check_log(await socket.run("echo", {"value": 1}))


async def test_a_key_that_comes_again_names_the_first_run_and_shows_it(socket: StreamClient) -> None:
    key = unique("key")
    first = await socket.start("echo", {"value": 1}, idempotency_key=key)
    events = await socket.ended(first)
    assert await socket.start("echo", {"value": 1}, idempotency_key=key) == first
    await caught_up(socket, first)
    assert socket.events(first) == [*events, *events]
    answer = await socket.ask("start", agent="echo", input={"value": 2}, idempotency_key=key)
    assert (answer["op"], answer["reason"]) == ("error", "IDEMPOTENCY_KEY_REUSED")


async def test_any_event_is_a_place_to_go_on_from(ready_user: User, socket: StreamClient) -> None:
    run_id = await socket.start("echo", {"value": 1})
    events = await socket.ended(run_id)
    for after_seq in range(len(events) + 1):
        async with ready_user.stream() as other:
            await other.follow(run_id, after_seq)
            assert (await caught_up(other, run_id))["seq"] == len(events)
            assert other.events(run_id) == events[after_seq:]
    answer = await socket.ask("follow", run_id=run_id, after_seq=len(events) + 1)
    assert (answer["reason"], answer["metadata"]["field"]) == ("REQUEST_INVALID", "after_seq")


async def test_a_run_under_way_is_joined_without_gap_or_repetition(
    ready_user: User, socket: StreamClient, gate: Gate
) -> None:
    run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
    executing = await socket.until(run_id, "tool_executing")
    async with ready_user.stream() as early, ready_user.stream() as late:
        await early.follow(run_id)
        assert (await caught_up(early, run_id))["seq"] == executing["seq"]
        await late.follow(run_id, executing["seq"])
        await caught_up(late, run_id)
        gate.open()
        events = await socket.ended(run_id)
        check_log(events)
        assert await early.ended(run_id) == events
        assert await late.ended(run_id) == events[executing["seq"] :]


async def test_an_unfollowed_run_is_shown_no_longer_and_goes_on(
    ready_user: User, socket: StreamClient, gate: Gate
) -> None:
    run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
    await socket.until(run_id, "tool_executing")
    assert (await socket.ask("unfollow", run_id=run_id))["op"] == "ok"
    assert (await socket.ask("unfollow", run_id=run_id))["op"] == "ok"
    seen = socket.events(run_id)
    async with ready_user.stream() as other:
        await other.follow(run_id)
        gate.open()
        events = await other.ended(run_id)
    assert (await socket.ask("ping"))["op"] == "pong"
    assert socket.events(run_id) == seen
    await socket.follow(run_id, len(seen))
    assert await socket.ended(run_id) == events


async def test_following_again_starts_over_where_it_says(socket: StreamClient, gate: Gate) -> None:
    run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
    seq = (await socket.until(run_id, "tool_executing"))["seq"]
    await socket.follow(run_id, 0)
    await caught_up(socket, run_id)
    gate.open()
    await socket.ended(run_id)
    seqs = [event["seq"] for event in socket.events(run_id)]
    assert seqs == [*range(1, seq + 1), *range(1, max(seqs) + 1)]


async def test_a_socket_that_leaves_does_not_end_its_run(ready_user: User, gate: Gate) -> None:
    async with ready_user.stream() as leaving:
        run_id = await leaving.start("gated", {"gate": gate.path, "value": 1})
    gate.open()
    async with ready_user.stream() as other:
        await other.follow(run_id)
        check_log(await other.ended(run_id))


async def test_a_cancelled_run_ends_with_who_asked(ready_user: User, socket: StreamClient, gate: Gate) -> None:
    run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
    await socket.until(run_id, "tool_executing")
    assert (await socket.ask("cancel", run_id=run_id, reason="enough"))["op"] == "ok"
    events = await socket.ended(run_id)
    check_log(events)
    assert types(events)[-1] == "agent_cancelled"
    assert events[-1]["data"]["requested_by"] == ready_user.context.user_id
    assert events[-1]["data"]["reason"] == "enough"
    answer = await socket.ask("cancel", run_id=run_id)
    assert (answer["op"], answer["reason"]) == ("error", "RUN_ENDED")


@pytest.mark.parametrize("op", ["follow", "cancel"])
async def test_a_run_that_is_not_there_is_not_found(socket: StreamClient, op: str) -> None:
    run_id = new_id()
    answer = await socket.ask(op, run_id=run_id)
    assert (answer["op"], answer["reason"], answer["metadata"]["run_id"]) == ("error", "RUN_NOT_FOUND", run_id)


async def test_many_watchers_see_one_run_each_event_once(ready_user: User, socket: StreamClient, gate: Gate) -> None:
    run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
    async with AsyncExitStack() as opened:
        watchers = [await opened.enter_async_context(ready_user.stream()) for _ in range(30)]
        for watcher in watchers:
            await watcher.follow(run_id)
        gate.open()
        events = await socket.ended(run_id)
        check_log(events)
        for watcher in watchers:
            assert await watcher.ended(run_id) == events


async def test_a_socket_that_does_not_read_is_let_go_and_loses_nothing(ready_user: User, socket: StreamClient) -> None:
    count = 30

    async def slow_runs() -> list[str]:
        runs = (await ready_user.http("GET", "/v1/runs?page_size=100")).json["runs"]
        found = [run["run_id"] for run in runs if run["session_id"].startswith("slow-")]
        return found if len(found) == count else []

    async with ready_user.stream() as slow:
        for number in range(count):
            await slow.send("start", agent="echo", input={"value": "x" * LARGE}, session_id=f"slow-{number}")
        for _ in range(3):
            check_log(await socket.run("echo", {"value": 1}))
        run_ids = await wait_until(slow_runs, what="the start of all runs")
        for run_id in run_ids:
            await socket.follow(run_id)
            check_log(await socket.ended(run_id))
        assert await slow.closed() == 4008
        assert slow.frames[-1]["reason"] == "SLOW_CONSUMER"
    cut = [run_id for run_id in run_ids if len(slow.events(run_id)) < len(socket.events(run_id))]
    assert cut
    for run_id in run_ids:
        seen = slow.events(run_id)
        assert seen == socket.events(run_id)[: len(seen)]
    async with ready_user.stream() as again:
        for run_id in cut:
            seen = slow.events(run_id)
            await again.follow(run_id, len(seen))
            assert [*seen, *await again.ended(run_id)] == socket.events(run_id)


class EventSource:
    """A client of a text/event-stream, as the standard says one reads it."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer
        self.retry_ms = 0
        self.last_id = ""

    async def events(self) -> AsyncIterator[Frame]:
        """The events until the stream ends."""
        data: list[str] = []
        async for line in self._answer.content:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "retry":
                self.retry_ms = int(value)
            elif name == "id":
                self.last_id = value
            elif name == "data":
                data.append(value)
            elif not name and data:
                frame: Frame = json.loads("\n".join(data))
                assert str(frame["seq"]) == self.last_id
                data = []
                yield frame


async def event_source(user: User, run_id: str, **headers: str) -> tuple[int, list[Frame], EventSource]:
    """Reads a run's event stream to its end."""
    headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {user.token}", **headers}
    url = f"{user.stack.gateway}/v1/runs/{run_id}/events"
    async with asyncio.timeout(20), aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        source = EventSource(answer)
        return answer.status, [event async for event in source.events()], source


async def test_an_event_stream_shows_what_the_socket_shows(ready_user: User, socket: StreamClient, gate: Gate) -> None:
    run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
    seq = (await socket.until(run_id, "tool_executing"))["seq"]
    async with asyncio.TaskGroup() as tasks:
        whole = tasks.create_task(event_source(ready_user, run_id))
        rest = tasks.create_task(event_source(ready_user, run_id, **{"Last-Event-ID": str(seq)}))
        gate.open()
        events = await socket.ended(run_id)
    status, seen, source = whole.result()
    assert (status, seen) == (200, events)
    assert source.retry_ms > 0
    assert rest.result()[:2] == (200, events[seq:])
    assert (await event_source(ready_user, run_id))[1] == events
    assert (await event_source(ready_user, run_id, **{"Last-Event-ID": str(len(events))}))[:2] == (204, [])


async def test_an_event_stream_of_no_run_is_a_problem(ready_user: User) -> None:
    status, events, _ = await event_source(ready_user, new_id())
    assert (status, events) == (404, [])


async def test_http_starts_waits_pages_and_cancels(ready_user: User, gate: Gate) -> None:
    started = await ready_user.http("POST", "/v1/runs?wait=20", {"agent": "echo", "input": {"value": 7}})
    assert (started.status, started.json["state"]) == (201, "COMPLETED")
    assert started.json["run"]["result"] == {"answer": 7}
    run_id = started.json["run_id"]
    pages: list[dict[str, Any]] = []
    while not pages or (pages[-1]["events"] and pages[-1]["events"][-1]["seq"] < pages[-1]["last_seq"]):
        after_seq = pages[-1]["events"][-1]["seq"] if pages else 0
        page = await ready_user.http("GET", f"/v1/runs/{run_id}/events?page_size=2&after_seq={after_seq}")
        pages.append(page.json)
    check_log([event for page in pages for event in page["events"]])
    assert len(pages) > 2
    held = await ready_user.http("POST", "/v1/runs?wait=1", {"agent": "gated", "input": {"gate": gate.path}})
    assert (held.status, held.json["state"]) == (201, "RUNNING")
    listed = await ready_user.http("GET", "/v1/runs?page_size=1")
    assert [run["run_id"] for run in listed.json["runs"]] == [held.json["run_id"]]
    following = await ready_user.http("GET", f"/v1/runs?page_size=1&page_token={listed.json['next_page_token']}")
    assert [run["run_id"] for run in following.json["runs"]] == [run_id]
    running = await ready_user.http("GET", "/v1/runs?state=RUNNING&agent=gated")
    assert [run["run_id"] for run in running.json["runs"]] == [held.json["run_id"]]
    cancelled = await ready_user.http("POST", f"/v1/runs/{held.json['run_id']}:cancel", {"reason": "enough"})
    assert cancelled.status == 202
    status, events, _ = await event_source(ready_user, held.json["run_id"])
    assert (status, events[-1]["type"], events[-1]["data"]["reason"]) == (200, "agent_cancelled", "enough")
    again = await ready_user.http("POST", f"/v1/runs/{run_id}:cancel")
    assert (again.status, again.json["reason"]) == (409, "RUN_ENDED")


async def test_what_exists_is_listed(ready_user: User) -> None:
    await ready_user.http("POST", "/v1/runs?wait=20", {"agent": "echo", "input": {"value": 1}, "session_id": "talk-1"})
    sessions = (await ready_user.http("GET", "/v1/sessions")).json["sessions"]
    assert [session["session_id"] for session in sessions] == ["talk-1"]
    runs = (await ready_user.http("GET", "/v1/runs?session_id=talk-1")).json["runs"]
    assert [run["session_id"] for run in runs] == ["talk-1"]
    agents = (await ready_user.http("GET", "/v1/agents")).json["agents"]
    assert [agent["name"] for agent in agents] == ["echo", "gated"]
    agent = (await ready_user.http("GET", "/v1/agents/echo")).json
    assert (agent["name"], agent["version"], agent["spec"]["kind"]) == ("echo", "1", "Agent")
    tools = {tool["name"]: tool for tool in (await ready_user.http("GET", "/v1/tools")).json["tools"]}
    assert tools["diagnostics.echo"]["effect"] == "pure"
    missing = await ready_user.http("GET", "/v1/agents/nobody")
    assert (missing.status, missing.json["reason"]) == (404, "AGENT_NOT_FOUND")
    broken = await ready_user.http("POST", "/v1/agents", {"kind": "Agent"}, role="operator")
    assert (broken.status, broken.json["reason"]) == (400, "SPEC_INVALID")
    assert broken.json["violations"]
