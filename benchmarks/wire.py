"""The platform's own rpcs as the benchmarks call them: one Append stream, ReadEvents, StartRun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
from mainspring.dev import Stack
from mainspring.v1 import (
    events_pb2,
    execution_pb2,
    execution_pb2_grpc,
    state_pb2,
    state_pb2_grpc,
    types_pb2,
)
from mainspring_kit.channel import Peer
from mainspring_kit.identity import ServiceTokens, UserExecutionContext, new_id
from mainspring_kit.tasks import background

# Any in this module: grpc.aio's calls are generic over messages that the stubs do not name.

EXECUTOR: Final = "benchmark"
EVENTS_PER_APPEND_MAX: Final = 64
BEAT_SECONDS: Final = 0.5
ANSWER_SECONDS_MAX: Final = 30.0
INPUT: Final = b'{"value":"forty-two"}'
_STEP_TEXT: Final = "I will look it up."


@dataclass(slots=True)
class Log:
    """A run that the benchmark drives itself, and how long its log is."""

    context: UserExecutionContext
    run_id: str
    last_seq: int = 1


class Wire:
    """Calls state and execution as a service does, on behalf of users."""

    def __init__(self, state: Peer, execution: Peer) -> None:
        self._state, self._execution = state, execution
        self._reads = state_pb2_grpc.StateServiceStub(state.channel)
        self._starts = execution_pb2_grpc.ExecutionServiceStub(execution.channel)
        self._appends: Any = self._reads.Append(**state.stream())
        self._beats: Any = self._reads.Heartbeat(**state.stream())
        self._waiting: dict[int, asyncio.Future[state_pb2.AppendResult]] = {}
        self._writing = asyncio.Lock()
        self._last_item_id = 0

    async def read_answers(self) -> None:
        """Hands the answers of the Append stream to those who wait for them."""
        while (response := await self._appends.read()) is not grpc.aio.EOF:
            for result in response.results:
                self._waiting.pop(result.item_id).set_result(result)

    async def beat(self) -> None:
        """Says that the executor which holds the runs lives."""
        number = 0
        while True:
            number += 1
            await self._beats.write(state_pb2.HeartbeatRequest(executor_id=EXECUTOR, beat=number))
            await asyncio.sleep(BEAT_SECONDS)

    async def read_beats(self) -> None:
        """Takes the answers to beats."""
        while await self._beats.read() is not grpc.aio.EOF:
            continue

    async def create(self, context: UserExecutionContext) -> Log:
        """A new run in the context's session; its first event is in the log."""
        run_id = new_id()
        create = state_pb2.CreateRun(
            user_id=context.user_id,
            session_id=context.session_id,
            agent="lookup",
            agent_version="1",
            input=INPUT,
            executor_id=EXECUTOR,
            policy=types_pb2.SESSION_POLICY_PARALLEL,
        )
        started = events_pb2.AgentStarted(agent_version="1", input=create.input, attempt=1)
        await self._append(context, run_id, [events_pb2.RunEvent(agent_started=started)], after=0, create=create)
        return Log(context, run_id)

    async def grow(self, log: Log, count: int = 1) -> None:
        """Appends so many model steps to a log, in one append of at most 64."""
        events = [
            events_pb2.RunEvent(
                agent_thinking=events_pb2.AgentThinking(step=1, text=_STEP_TEXT, model="scripted/script")
            )
            for _ in range(count)
        ]
        await self._append(log.context, log.run_id, events, after=log.last_seq)
        log.last_seq += count

    async def grow_to(self, log: Log, length: int) -> None:
        """Appends model steps until the log has this length."""
        while log.last_seq < length:
            await self.grow(log, min(EVENTS_PER_APPEND_MAX, length - log.last_seq))

    async def end(self, log: Log) -> None:
        """Ends a run well."""
        completed = events_pb2.AgentCompleted(result=b"{}", duration_ms=1.0)
        event = events_pb2.RunEvent(agent_completed=completed)
        await self._append(log.context, log.run_id, [event], after=log.last_seq)
        log.last_seq += 1

    async def read_page(self, context: UserExecutionContext, run_id: str, *, after_seq: int, size: int) -> None:
        """Reads a page that must be full."""
        request = state_pb2.ReadEventsRequest(run_id=run_id, after_seq=after_seq, page_size=size)
        response = await self._reads.ReadEvents(request, **self._state.call(context))
        if len(response.events) != size:
            raise RuntimeError(f"a page of {size} events had {len(response.events)}")

    async def start(self, context: UserExecutionContext, agent: str, *, wait_seconds: int = 0) -> str:
        """Starts a run in the context's session; gives its id when it is durable, or when it has ended."""
        request = execution_pb2.StartRunRequest(agent=agent, session_id=context.session_id, input=INPUT)
        if wait_seconds:
            request.wait.FromSeconds(wait_seconds)
        response = await self._starts.StartRun(
            request, **self._execution.call(context, timeout_seconds=wait_seconds + 5.0)
        )
        if wait_seconds and response.run.state != types_pb2.RUN_STATE_COMPLETED:
            raise RuntimeError(
                f"run {response.run_id} is {types_pb2.RunState.Name(response.run.state)}: {response.run.error}"
            )
        return response.run_id

    async def wait_ended(self, context: UserExecutionContext, run_id: str) -> None:
        """Returns when a run has ended."""
        await self._reads.WaitRun(
            state_pb2.WaitRunRequest(run_id=run_id), **self._state.call(context, timeout_seconds=ANSWER_SECONDS_MAX)
        )

    def close(self) -> None:
        """Breaks the streams."""
        self._appends.cancel()
        self._beats.cancel()

    async def _append(
        self,
        context: UserExecutionContext,
        run_id: str,
        events: list[events_pb2.RunEvent],
        *,
        after: int,
        create: state_pb2.CreateRun | None = None,
    ) -> None:
        for seq, event in enumerate(events, start=after + 1):
            event.run_id, event.seq, event.session_id, event.agent = run_id, seq, context.session_id, "lookup"
        self._last_item_id += 1
        append = state_pb2.Append(
            item_id=self._last_item_id,
            append_id=new_id(),
            tenant_id=context.tenant_id,
            run_id=run_id,
            expected_seq=after,
            epoch=1,
            events=events,
            create=create,
        )
        answer = self._waiting[append.item_id] = asyncio.get_running_loop().create_future()
        async with self._writing:
            await self._appends.write(state_pb2.AppendRequest(appends=[append]))
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            result = await answer
        if result.status.code:
            raise RuntimeError(f"an append was refused: {result.status.message}")


@asynccontextmanager
async def wire(running: Stack) -> AsyncIterator[Wire]:
    """Streams and channels to the stack's first state and execution while the block runs."""
    tokens = ServiceTokens(running.service_secret, EXECUTOR)
    services = running.services
    async with Peer(services["state"], tokens) as state, Peer(services["execution"], tokens) as execution:
        made = Wire(state, execution)
        try:
            async with background(made.read_answers(), made.beat(), made.read_beats()):
                yield made
        finally:
            made.close()
