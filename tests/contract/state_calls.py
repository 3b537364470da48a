"""Calls of the state service as its callers make them: executors that append, beat and claim, and watchers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
from google.rpc import status_pb2
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import from_status
from mainspring_kit.identity import UserExecutionContext, new_id
from mainspring_state.__main__ import wired
from mainspring_state.config import StateSettings

from test_framework.identities import Identities, make_context, unique

# Any in this module: generated stubs and grpc.aio's calls are generic over messages that only the caller knows.

TIMEOUT = 20.0
OK = 0

Wiring = Callable[[], AbstractAsyncContextManager[dict[str, Any]]]

# Short enough that a test may wait for them, long enough that a slow machine does not lose a lease by itself.
TIMES = {"lease_seconds": 2.0, "broken_lease_seconds": 0.5, "claim_seconds": 0.2}
BEAT_SECONDS = TIMES["lease_seconds"] / 8


def wiring(environment: dict[str, Any], **changes: Any) -> Wiring:
    """The service's own wiring, with shorter leases."""

    @asynccontextmanager
    async def wire() -> AsyncIterator[dict[str, Any]]:
        async with wired(StateSettings(**{**environment, **TIMES, **changes})) as (servicer, _):
            yield {"State": servicer}

    return wire


def reason_of(status: status_pb2.Status) -> str:
    """The reason of an item's status; empty when it is OK."""
    return "" if status.code == OK else from_status(status).reason_name


def started() -> events_pb2.RunEvent:
    """The first event, without its place."""
    return events_pb2.RunEvent(agent_started=events_pb2.AgentStarted(agent_version="1", input=b"{}", attempt=1))


def thinking(text: str = "Hm.", *, provider_state: bytes = b"") -> events_pb2.RunEvent:
    """A model step, without its place."""
    step = events_pb2.AgentThinking(step=1, text=text, provider_state=provider_state)
    return events_pb2.RunEvent(agent_thinking=step)


def completed(result: bytes = b'{"answer":1}') -> events_pb2.RunEvent:
    """A good end, without its place."""
    done = events_pb2.AgentCompleted(
        result=result,
        usage=types_pb2.Usage(input_tokens=3, output_tokens=5, cost_usd=0.25),
        duration_ms=1.5,
        stages=[types_pb2.Stage(name="core_execution", duration_ms=1.25)],
    )
    return events_pb2.RunEvent(agent_completed=done)


def cancelled() -> events_pb2.RunEvent:
    """An end that somebody asked for, without its place."""
    return events_pb2.RunEvent(agent_cancelled=events_pb2.AgentCancelled(requested_by="ann"))


class Executor:
    """One Append stream and what is waiting for an answer on it."""

    def __init__(self, stub: Any, identities: Identities, *, timeout: float = TIMEOUT) -> None:
        self.executor_id = unique("executor")
        self.state_id = ""
        self.greeted = asyncio.Event()
        self._call = stub.Append(metadata=identities.service_metadata(), timeout=timeout)
        self._waiting: dict[int, asyncio.Future[state_pb2.AppendResult]] = {}
        self._last_item_id = 0
        self._writing = asyncio.Lock()

    async def read(self) -> None:
        """Resolves answers as they come."""
        while (response := await self._call.read()) is not grpc.aio.EOF:
            self.state_id = response.state_id or self.state_id
            self.greeted.set()
            for result in response.results:
                self._waiting.pop(result.item_id).set_result(result)

    async def send(self, *appends: state_pb2.Append) -> list[state_pb2.AppendResult]:
        """Sends appends in one frame and gives their answers in the same order."""
        request = state_pb2.AppendRequest(appends=appends)
        futures = []
        for append in request.appends:
            self._last_item_id += 1
            append.item_id = self._last_item_id
            futures.append(asyncio.get_running_loop().create_future())
            self._waiting[append.item_id] = futures[-1]
        async with self._writing:
            await self._call.write(request)
        async with asyncio.timeout(TIMEOUT):
            return [await future for future in futures]

    async def send_one(self, append: state_pb2.Append) -> state_pb2.AppendResult:
        """Sends one append and gives its answer."""
        (result,) = await self.send(append)
        return result

    def close(self) -> None:
        """Breaks the stream."""
        self._call.cancel()

    def create(self, user: UserExecutionContext, **fields: Any) -> state_pb2.Append:
        """The append that makes a run of the user in the user's session; `fields` are CreateRun's."""
        made: dict[str, Any] = {
            "user_id": user.user_id,
            "session_id": user.session_id,
            "agent": "lookup",
            "agent_version": "1",
            "input": b'{"value":1}',
            "executor_id": self.executor_id,
            "trace_id": user.trace_id,
        }
        create = state_pb2.CreateRun(**(made | fields))
        return self.append(user, new_id(), started(), create=create)

    def append(
        self, user: UserExecutionContext, run_id: str, *events: events_pb2.RunEvent, after: int = 0, **fields: Any
    ) -> state_pb2.Append:
        """An append of events behind the seq `after`; they are put in their places."""
        placed = []
        for offset, event in enumerate(events, start=1):
            copy = events_pb2.RunEvent()
            copy.CopyFrom(event)
            copy.run_id, copy.seq, copy.session_id, copy.agent = run_id, after + offset, user.session_id, "lookup"
            placed.append(copy)
        known: dict[str, Any] = {"append_id": new_id(), "epoch": 1}
        return state_pb2.Append(
            tenant_id=user.tenant_id, run_id=run_id, expected_seq=after, events=placed, **(known | fields)
        )

    async def start(self, user: UserExecutionContext, **fields: Any) -> str:
        """Creates a run that must begin at once and gives its id."""
        result = await self.send_one(self.create(user, **fields))
        assert (reason_of(result.status), result.state) == ("", types_pb2.RUN_STATE_RUNNING)
        return result.run_id

    async def go_on(self, user: UserExecutionContext, run_id: str, *events: events_pb2.RunEvent, **known: Any) -> None:
        """Appends events that must be taken."""
        result = await self.send_one(self.append(user, run_id, *events, **known))
        assert reason_of(result.status) == ""


@asynccontextmanager
async def executing(stub: Any, identities: Identities, *, timeout: float = TIMEOUT) -> AsyncIterator[Executor]:
    """An executor's Append stream while the block runs."""
    executor = Executor(stub, identities, timeout=timeout)
    reader = asyncio.ensure_future(executor.read())
    try:
        yield executor
    finally:
        executor.close()
        await asyncio.wait([reader])
        if not reader.cancelled():
            reader.exception()


class Watcher:
    """One Follow stream and what came down it."""

    def __init__(self, stub: Any, metadata: Any, *, timeout: float = TIMEOUT) -> None:
        self.state_id = ""
        self.deliveries: list[state_pb2.Delivery] = []
        self._call = stub.Follow(metadata=metadata, timeout=timeout)

    async def ask(self, **fields: Any) -> None:
        """Sends a FollowRequest."""
        await self._call.write(state_pb2.FollowRequest(**fields))

    async def subscribe(
        self, run_id: str, *, number: int = 1, after: int = 0, user: UserExecutionContext | None = None
    ) -> None:
        """Follows a run, as the user where a service asks."""
        context = None if user is None else user.to_message()
        wanted = state_pb2.Subscribe(subscription_id=number, run_id=run_id, after_seq=after, context=context)
        await self.ask(subscribe=[wanted])

    async def until(self, condition: Callable[[], bool]) -> None:
        """Reads until the condition holds for what came."""
        async with asyncio.timeout(TIMEOUT):
            while not condition():
                response = await self._call.read()
                assert response is not grpc.aio.EOF, f"the stream ended: {await self._call.code()}"
                self.state_id = response.state_id or self.state_id
                self.deliveries.extend(response.deliveries)

    async def ended(self) -> None:
        """Reads to the stream's end; raises what it ended with."""
        async with asyncio.timeout(TIMEOUT):
            while (response := await self._call.read()) is not grpc.aio.EOF:
                self.deliveries.extend(response.deliveries)
        if await self._call.code() is not grpc.StatusCode.OK:
            await self._call  # raises

    async def half_close(self) -> None:
        """Asks for nothing more."""
        await self._call.done_writing()

    def close(self) -> None:
        """Breaks the stream."""
        self._call.cancel()

    def seqs(self, *, number: int | None = None) -> list[int]:
        """The seqs that came, of one subscription or of all."""
        return [
            event.seq
            for delivery in self.deliveries
            if number is None or delivery.subscription_id == number
            for event in delivery.events
        ]

    def caught_up(self, number: int = 1) -> list[int]:
        """What caught_up said for a subscription."""
        return [
            delivery.caught_up_seq
            for delivery in self.deliveries
            if delivery.subscription_id == number and delivery.HasField("caught_up_seq")
        ]

    def statuses(self, number: int = 1) -> list[str]:
        """With what the subscription was refused."""
        return [
            reason_of(delivery.status)
            for delivery in self.deliveries
            if delivery.subscription_id == number and delivery.HasField("status")
        ]

    async def until_seq(self, seq: int) -> None:
        """Reads until an event of this seq came."""
        await self.until(lambda: seq in self.seqs())

    async def until_caught_up(self, number: int = 1) -> None:
        """Reads until the subscription's replay is done."""
        await self.until(lambda: bool(self.caught_up(number)))

    async def until_refused(self, number: int = 1) -> None:
        """Reads until the subscription was refused."""
        await self.until(lambda: bool(self.statuses(number)))


class Publisher:
    """One PublishDeltas stream, as an executor opens it."""

    def __init__(self, stub: Any, identities: Identities) -> None:
        self._call = stub.PublishDeltas(metadata=identities.service_metadata(), timeout=TIMEOUT)

    async def write(
        self, user: UserExecutionContext, run_id: str, text: str, *, step: int = 1, offset: int = 0
    ) -> None:
        """Sends one piece of text."""
        delta = events_pb2.TextDelta(run_id=run_id, step=step, offset=offset, text=text)
        published = state_pb2.PublishedDelta(tenant_id=user.tenant_id, user_id=user.user_id, delta=delta)
        await self._call.write(state_pb2.PublishDeltasRequest(deltas=[published]))

    async def first(self) -> Any:
        """The first frame down the stream."""
        return await self._call.read()

    async def end(self) -> grpc.StatusCode:
        """Half-closes, and reads to the end."""
        await self._call.done_writing()
        while await self._call.read() is not grpc.aio.EOF:
            pass
        code: grpc.StatusCode = await self._call.code()
        return code

    def close(self) -> None:
        """Breaks the stream."""
        self._call.cancel()


def person(tenant_id: str = "") -> UserExecutionContext:
    """A user with a session."""
    return make_context(tenant_id)


class Claimer:
    """An executor that beats and, with credit, claims."""

    def __init__(self, stub: Any, identities: Identities, executor_id: str, credit: int) -> None:
        metadata = identities.service_metadata()
        self.executor_id = executor_id
        self.claimed: asyncio.Queue[state_pb2.ClaimedRun] = asyncio.Queue()
        self.inputs: asyncio.Queue[state_pb2.RunInput] = asyncio.Queue()
        self.stored = asyncio.Event()
        self._beats = stub.Heartbeat(metadata=metadata, timeout=TIMEOUT * 2)
        self._claims = None
        if credit:
            request = state_pb2.ClaimRunsRequest(executor_id=executor_id, credit=credit)
            self._claims = stub.ClaimRuns(request, metadata=metadata, timeout=TIMEOUT * 2)
        self._is_silent = asyncio.Event()

    async def beat(self) -> None:
        """Beats until it is silenced."""
        number = 0
        while not self._is_silent.is_set():
            number += 1
            await self._beats.write(state_pb2.HeartbeatRequest(executor_id=self.executor_id, beat=number))
            try:
                await asyncio.wait_for(self._is_silent.wait(), BEAT_SECONDS)
            except TimeoutError:
                continue

    async def read_beats(self) -> None:
        """Takes in what comes down the heartbeat stream."""
        while (response := await self._beats.read()) is not grpc.aio.EOF:
            if response.beat:
                assert response.lease.ToTimedelta() == timedelta(seconds=TIMES["lease_seconds"])
                self.stored.set()
            for run_input in response.inputs:
                self.inputs.put_nowait(run_input)

    async def read_claims(self) -> None:
        """Takes in claimed runs."""
        while self._claims is not None and (response := await self._claims.read()) is not grpc.aio.EOF:
            assert 1 <= len(response.runs) <= 64
            for claimed in response.runs:
                self.claimed.put_nowait(claimed)

    async def next_claim(self) -> state_pb2.ClaimedRun:
        """The next claimed run."""
        return await asyncio.wait_for(self.claimed.get(), TIMEOUT)

    async def next_input(self) -> state_pb2.RunInput:
        """The next input."""
        return await asyncio.wait_for(self.inputs.get(), TIMEOUT)

    def fall_silent(self) -> None:
        """Beats no more, its streams stay."""
        self._is_silent.set()

    async def leave(self) -> None:
        """Says goodbye."""
        self._is_silent.set()
        await self._beats.write(state_pb2.HeartbeatRequest(executor_id=self.executor_id, beat=99_999, leaving=True))

    def break_off(self) -> None:
        """Dies: its streams break."""
        self._is_silent.set()
        self._beats.cancel()
        self.break_claims()

    def break_claims(self) -> None:
        """Loses its claim stream only."""
        if self._claims is not None:
            self._claims.cancel()


@asynccontextmanager
async def claiming(
    stub: Any, identities: Identities, executor_id: str = "", *, credit: int = 100
) -> AsyncIterator[Claimer]:
    """A living executor."""
    claimer = Claimer(stub, identities, executor_id or unique("claimer"), credit)
    tasks = [asyncio.ensure_future(work()) for work in (claimer.beat, claimer.read_beats, claimer.read_claims)]
    try:
        await asyncio.wait_for(claimer.stored.wait(), TIMEOUT)
        yield claimer
    finally:
        claimer.break_off()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled() and isinstance(task.exception(), AssertionError):
                raise task.exception() or AssertionError


async def log_of(
    stub: Any, identities: Identities, user: UserExecutionContext, run_id: str
) -> list[events_pb2.RunEvent]:
    """The first page of a run's log."""
    metadata = identities.metadata(user.tenant_id, user.user_id)
    response = await stub.ReadEvents(state_pb2.ReadEventsRequest(run_id=run_id), metadata=metadata, timeout=TIMEOUT)
    return list(response.events)
