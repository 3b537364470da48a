"""How a worker runs calls: one outcome each, whatever the function does; cancels, times and bounds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from mainspring.errors import ToolError
from mainspring.tool import ToolContext, declare, tool
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring.worker.calls import Calls

from test_framework.waiting import wait_until

pytestmark = pytest.mark.unit

OK = types_pb2.TOOL_STATUS_OK
ERROR = types_pb2.TOOL_STATUS_ERROR
TIMED_OUT = types_pb2.TOOL_STATUS_TIMED_OUT
CANCELLED = types_pb2.TOOL_STATUS_CANCELLED


class FakeSink:
    """Keeps outcomes by dispatch, and acknowledged cancels."""

    def __init__(self) -> None:
        self.results: dict[int, pb.WorkerResult] = {}
        self.acknowledged: list[str] = []

    def put(self, result: pb.WorkerResult) -> None:
        assert result.dispatch_id not in self.results
        self.results[result.dispatch_id] = result

    def acknowledge(self, call_id: str) -> None:
        self.acknowledged.append(call_id)

    async def result(self, dispatch_id: int = 1) -> pb.WorkerResult:
        await wait_until(lambda: dispatch_id in self.results, 10, what=f"outcome {dispatch_id}")
        return self.results[dispatch_id]


@asynccontextmanager
async def running(*functions: Callable[..., Any], concurrency: int = 10, threads: int = 2) -> AsyncIterator[Calls]:
    """Calls of these tools; whatever still runs is cancelled in the end."""
    found = {declaration.name: declaration for declaration in map(declare, functions)}
    tasks: set[asyncio.Task[Any]] = set()
    async with asyncio.TaskGroup() as group:
        calls = Calls(found, group, concurrency=concurrency, threads=threads)
        before = asyncio.all_tasks()
        try:
            yield calls
        finally:
            calls.close()
            tasks = asyncio.all_tasks() - before
            for task in tasks:
                task.cancel()


def call(
    name: str, dispatch_id: int = 1, *, call_id: str = "", seconds: float = 0, tenant: str = "acme", **arguments: Any
) -> pb.WorkerCall:
    made = pb.WorkerCall(
        dispatch_id=dispatch_id,
        call_id=call_id or f"c{dispatch_id}",
        tool=name,
        arguments=orjson.dumps(arguments),
        attempt=1,
    )
    made.context.tenant_id, made.context.user_id, made.context.run_id = tenant, "ann", "run"
    if seconds:
        made.timeout.FromNanoseconds(int(seconds * 1e9))
    return made


@tool
async def double(value: int) -> int:
    return value * 2


@tool
def double_in_thread(value: int, context: ToolContext) -> dict[str, Any]:
    return {"value": value * 2, "call": context.call_id, "thread": threading.current_thread().name}


@tool
async def wait_for_ever() -> None:
    await asyncio.Event().wait()


async def test_coroutines_and_functions_are_run() -> None:
    sink = FakeSink()
    async with running(double, double_in_thread) as calls:
        calls.start(call("double", 1, value=4), sink)
        calls.start(call("double_in_thread", 2, value=5), sink)
        first, second = await sink.result(1), await sink.result(2)
    assert (first.status, first.result) == (OK, b"8")
    answer = orjson.loads(second.result)
    assert (answer["value"], answer["call"]) == (10, "c2")
    assert answer["thread"].startswith("tool")
    assert first.duration_ms > 0
    assert calls.in_flight == 0
    assert calls.idle.is_set()


async def test_no_arguments_are_an_empty_object() -> None:
    @tool
    async def act() -> str:
        return "done"

    sink = FakeSink()
    async with running(act) as calls:
        bare = call("act")
        bare.arguments = b""
        calls.start(bare, sink)
        assert (await sink.result()).result == b'"done"'


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (b'{"value": "many"}', "value"),
        (b"{}", "value"),
        (b'{"value": 1, "other": 2}', "other"),
        (b"[1]", ""),
        (b"{", ""),
    ],
)
async def test_arguments_that_do_not_match_are_refused_with_their_path(arguments: bytes, path: str) -> None:
    sink = FakeSink()
    async with running(double) as calls:
        wrong = call("double")
        wrong.arguments = arguments
        calls.start(wrong, sink)
        result = await sink.result()
    assert (result.status, result.error.code, result.error.reason) == (
        ERROR,
        "INVALID_ARGUMENT",
        "TOOL_ARGUMENTS_INVALID",
    )
    assert dict(result.error.metadata) == {"tool": "double", "path": path}
    assert path in result.error.message


async def test_a_path_leads_into_lists() -> None:
    @tool
    async def add(items: list[dict[str, int]]) -> None: ...

    sink = FakeSink()
    async with running(add) as calls:
        calls.start(call("add", items=[{"a": 1}, {"a": "x"}]), sink)
        assert (await sink.result()).error.metadata["path"] == "items[1].a"


async def _raise_value() -> None:
    raise ValueError("the figure is odd")


async def _raise_tool_error() -> None:
    raise ToolError("No bill 7.", code="NOT_FOUND", reason="NO_BILL", metadata={"bill": 7})


async def _exit() -> None:
    raise SystemExit(3)


async def _cancelled() -> None:
    inner = asyncio.get_running_loop().create_future()
    inner.cancel()
    await inner


async def _own_timeout() -> None:
    raise TimeoutError("the bank did not answer")


async def _not_json() -> object:
    return {1, 2}


async def _own_validation() -> object:
    return declare(double).arguments.validate_json(b"{}")


def _stop_iteration() -> object:
    return next(iter(()))


@pytest.mark.parametrize(
    ("function", "code", "reason", "word"),
    [
        (_raise_value, "UNKNOWN", "TOOL_FAILED", "ValueError: the figure is odd"),
        (_raise_tool_error, "NOT_FOUND", "NO_BILL", "No bill 7."),
        (_exit, "UNKNOWN", "TOOL_FAILED", "SystemExit"),
        (_cancelled, "UNKNOWN", "TOOL_FAILED", "cancelled"),
        (_own_timeout, "UNKNOWN", "TOOL_FAILED", "the bank did not answer"),
        (_not_json, "UNKNOWN", "TOOL_FAILED", "not JSON"),
        (_own_validation, "UNKNOWN", "TOOL_FAILED", "ValidationError"),
        (_stop_iteration, "UNKNOWN", "TOOL_FAILED", "StopIteration"),
    ],
)
async def test_whatever_a_tool_raises_is_its_outcome(
    function: Callable[..., Any], code: str, reason: str, word: str
) -> None:
    sink = FakeSink()
    async with running(tool(name="act")(function)) as calls:
        calls.start(call("act"), sink)
        result = await sink.result()
    assert (result.status, result.error.code, result.error.reason) == (ERROR, code, reason)
    assert word in result.error.message
    assert result.error.metadata["tool"] == "act"


async def test_a_result_over_the_bound_is_refused() -> None:
    @tool
    async def blow() -> str:
        return "x" * (16 << 20)

    sink = FakeSink()
    async with running(blow) as calls:
        calls.start(call("blow"), sink)
        result = await sink.result()
    assert (result.error.code, result.error.reason) == ("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE")
    assert result.error.metadata["bytes"] == str((16 << 20) + 2)


async def test_a_tool_that_is_not_here_is_not_found() -> None:
    sink = FakeSink()
    async with running(double) as calls:
        calls.start(call("triple"), sink)
        assert (await sink.result()).error.reason == "TOOL_NOT_FOUND"


async def test_time_runs_out() -> None:
    sink = FakeSink()
    async with running(wait_for_ever) as calls:
        calls.start(call("wait_for_ever", seconds=0.05), sink)
        result = await sink.result()
    assert (result.status, result.error.code, result.error.reason) == (TIMED_OUT, "DEADLINE_EXCEEDED", "TOOL_TIMED_OUT")
    assert dict(result.error.metadata) == {"tool": "wait_for_ever", "timeout_seconds": "0.05"}


async def test_a_cancel_reaches_the_coroutine_which_may_tidy_up() -> None:
    seen: list[str] = []

    @tool
    async def work() -> None:
        seen.append("began")
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("tidied")

    sink = FakeSink()
    async with running(work) as calls:
        calls.start(call("work"), sink)
        await wait_until(lambda: seen)
        calls.cancel(1, sink)
        result = await sink.result()
    assert seen == ["began", "tidied"]
    assert (result.status, result.error.reason) == (CANCELLED, "TOOL_CANCELLED")
    assert sink.acknowledged == ["c1"]


async def test_a_call_cancelled_before_it_began_never_runs() -> None:
    seen: list[int] = []

    @tool
    async def work() -> None:
        seen.append(1)

    sink = FakeSink()
    async with running(work) as calls:
        calls.start(call("work"), sink)
        calls.cancel(1, sink)
        assert (await sink.result()).status == CANCELLED
    assert seen == []


async def test_a_thread_is_asked_and_not_reported_as_stopped_before_it_ends() -> None:
    began, go_on = threading.Event(), threading.Event()
    contexts: list[ToolContext] = []

    @tool
    def work(context: ToolContext) -> None:
        contexts.append(context)
        began.set()
        go_on.wait(10)

    sink = FakeSink()
    async with running(work, double, concurrency=1) as calls:
        calls.start(call("work"), sink)
        await wait_until(began.is_set)
        calls.cancel(1, sink)
        await wait_until(lambda: contexts[0].cancelled)
        calls.start(call("double", 2, value=1), sink)
        assert sink.results == {}, "it keeps its place"
        assert sink.acknowledged == []
        go_on.set()
        assert (await sink.result(1)).status == CANCELLED
        assert (await sink.result(2)).status == OK
    assert sink.acknowledged == ["c1"]


async def test_a_call_that_waits_for_a_thread_is_cancelled_at_once() -> None:
    began, go_on = threading.Event(), threading.Event()
    seen: list[int] = []

    @tool
    def work(number: int) -> None:
        seen.append(number)
        began.set()
        go_on.wait(10)

    sink = FakeSink()
    async with running(work, threads=1) as calls:
        calls.start(call("work", 1, number=1), sink)
        await wait_until(began.is_set)
        calls.start(call("work", 2, number=2), sink)
        await wait_until(lambda: calls.in_flight == 2)
        calls.cancel(2, sink)
        assert (await sink.result(2)).status == CANCELLED
        go_on.set()
        assert (await sink.result(1)).status == OK
    assert seen == [1]


async def test_no_more_run_at_once_than_allowed() -> None:
    most, now = 0, 0
    release = asyncio.Event()

    @tool
    async def work() -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await release.wait()
        now -= 1

    sink = FakeSink()
    async with running(work, concurrency=3) as calls:
        for number in range(1, 9):
            calls.start(call("work", number), sink)
        await wait_until(lambda: now == 3)
        release.set()
        for number in range(1, 9):
            assert (await sink.result(number)).status == OK
    assert most == 3


async def test_the_same_call_again_gets_the_outcome_of_the_execution_under_way() -> None:
    release, runs = asyncio.Event(), 0

    @tool
    async def work() -> int:
        nonlocal runs
        runs = number = runs + 1
        await release.wait()
        return number

    first, second = FakeSink(), FakeSink()
    async with running(work) as calls:
        calls.start(call("work", 1, call_id="same"), first)
        await wait_until(lambda: runs)
        calls.start(call("work", 7, call_id="same"), second)
        calls.start(call("work", 8, call_id="same", tenant="globex"), second)
        release.set()
        results = [await first.result(1), await second.result(7), await second.result(8)]
    assert [(result.dispatch_id, result.result) for result in results] == [(1, b"1"), (7, b"1"), (8, b"2")]


async def test_a_worker_that_stops_sends_no_outcome_for_what_it_cuts_off() -> None:
    began = asyncio.Event()

    @tool
    async def work() -> None:
        began.set()
        await asyncio.Event().wait()

    sink = FakeSink()
    async with running(work) as calls:
        calls.start(call("work"), sink)
        await asyncio.wait_for(began.wait(), 10)
        assert not calls.idle.is_set()
    assert sink.results == {}
