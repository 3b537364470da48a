"""What stands around the services in a history: models, tools with effects, a catalog, and the wire between states."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from random import Random
from typing import Any

import orjson
from mainspring.v1 import dispatcher_pb2, registry_pb2, state_pb2, types_pb2
from mainspring_execution.core.intrinsic import AGENT_PREFIX, APPROVE, SIGNAL, SLEEP
from mainspring_execution.core.intrinsic import TOOLS as INTRINSIC
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.thought import Thought, Turn, WantedCall
from mainspring_execution.engine.catalog import PreparedAgent
from mainspring_execution.peers import CallPool
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import UserExecutionContext
from mainspring_kit.streams import Replies, serve_batches
from mainspring_state.core import hearing

from tests.simulation.checks import EFFECTS, Checker
from tests.simulation.loop import PROCESS, SimLoop

# Any in this module: JSON, and servicer contexts, which nothing here looks at.

OUTSTANDING_MAX = 10_000
TOOLS = tuple(EFFECTS)
AGENT_TOOLS = frozenset(
    {f"{effect}.tool" for effect in TOOLS} | INTRINSIC.keys() | {"agent.quick", "agent.slow", "handoff.slow"}
)


class Model:
    """Plays the script in the run's input: a list of tools for each step, and a result behind the last."""

    needs_history = False

    needs_tools = False
    fallbacks = 0
    repairs = 0

    def rank(self, name: str) -> int:
        """There is one."""
        return 0

    def __init__(self, checker: Checker, rng: Random, *, executor_id: str, think_seconds: float) -> None:
        self._checker = checker
        self._rng = rng
        self._executor_id = executor_id
        self._think_seconds = think_seconds

    def waits(self, step: int) -> bool:
        """Whether `think` may suspend."""
        return self._think_seconds > 0

    async def think(self, turn: Turn, emit: Callable[[str], None]) -> Thought:
        """Answers the step, or fails in passing."""
        self._checker.model_called(self._executor_id, turn.run_id, turn.step)
        if self._think_seconds:
            await asyncio.sleep(self._think_seconds * self._rng.random())
            if self._rng.random() < 0.05:
                raise MainspringError(Reason.PEER_UNAVAILABLE, "The model is busy: ask again.", peer="model")
        script = orjson.loads(turn.input)["script"]
        calls = script[turn.step - 1]
        return Thought(
            model="simulated",
            text=f"step {turn.step}",
            usage=types_pb2.Usage(input_tokens=1),
            calls=tuple(_want(call, place=f"{turn.step}.{index}") for index, call in enumerate(calls)),
            result=b'{"answer":1}' if turn.step == len(script) else b"",
            provider_state=b"secret",
        )


def _want(call: str, *, place: str) -> WantedCall:
    """A call of a script: a tool, and after a colon what is special about this call."""
    tool, _, special = call.partition(":")
    arguments: dict[str, Any] = {}
    if tool == SLEEP:
        arguments = {"seconds": float(special)}
    elif tool == SIGNAL:
        arguments = {"name": "maybe", "timeout": float(special)} if special else {"name": "go"}
    elif tool == APPROVE:
        arguments = {"title": "May I?", "arguments": {"place": place}}
        arguments |= {"expires": float(special)} if special else {}
    elif tool.startswith(AGENT_PREFIX):
        arguments = {"script": [[special], []]}
    elif tool in EFFECTS:
        tool, arguments = f"{tool}.tool", {"place": place}
    return WantedCall(tool, orjson.dumps(arguments))


class Catalog:
    """Agents whose models answer at once, take their time, or too much of it; and a tool of each effect."""

    def __init__(self, checker: Checker, rng: Random, *, executor_id: str) -> None:
        self._agents = {
            name: PreparedAgent(
                AgentPlan(
                    agent=name,
                    version="1",
                    provider="simulated",
                    model={},
                    instructions="",
                    tools=AGENT_TOOLS,
                    output_schema=None,
                    timeout_seconds=timeout_seconds,
                    steps_max=20,
                    concurrent_max=int(name == "capped"),
                ),
                Model(checker, rng, executor_id=executor_id, think_seconds=think_seconds),
            )
            for name, think_seconds, timeout_seconds in (
                ("quick", 0, 300),
                ("slow", 0.2, 300),
                ("late", 2.0, 1.0),
                ("capped", 0.1, 300),
            )
        }

    async def resolve(
        self, context: UserExecutionContext, name: str, *, alias: str = "", version: str = ""
    ) -> PreparedAgent:
        """The agent."""
        return self._agents[name]

    async def recall(self, context: UserExecutionContext, name: str, *, version: str) -> PreparedAgent:
        """The agent."""
        return self._agents[name]

    async def limits_of(self, context: UserExecutionContext) -> registry_pb2.TenantLimits:
        """None."""
        return registry_pb2.TenantLimits()

    def lacks(self, tools: Iterable[str], *, tenant_id: str) -> bool:
        """Nothing."""
        return False

    def tool(self, name: str, *, tenant_id: str) -> None:
        """Nothing is said of it."""

    def effect_of(self, tool: str, *, tenant_id: str) -> int:
        """As the tool's name says."""
        return EFFECTS[tool.split(".")[0]]


class ObservedCalls:
    """The product's pool of calls, which also tells when an executor decides to make one."""

    def __init__(self, pool: CallPool, on_post: Callable[[dispatcher_pb2.ToolCall], None]) -> None:
        self.run = pool.run
        self._pool = pool
        self._on_post = on_post

    def post(self, call: dispatcher_pb2.ToolCall) -> asyncio.Future[dispatcher_pb2.ToolResult]:
        """Sends the call."""
        self._on_post(call)
        return self._pool.post(call)


class Workers:
    """DispatcherService: each call has its effect after a while, or never: it is cancelled, or its process dies."""

    def __init__(self, checker: Checker, loop: SimLoop, rng: Random) -> None:
        self._checker = checker
        self._loop = loop
        self._rng = rng
        self._seconds = rng.choice((0.002, 0.05, 0.5))
        self._timers: dict[str, Any] = {}
        # Who waits for a call's answer: one that comes again while it is under way has its effect once.
        self._asked: dict[str, list[tuple[dispatcher_pb2.ToolCall, Replies[dispatcher_pb2.ToolResult]]]] = {}

    async def CallTools(
        self, requests: AsyncIterator[dispatcher_pb2.CallToolsRequest], context: Any
    ) -> AsyncIterator[dispatcher_pb2.CallToolsResponse]:
        replies: Replies[dispatcher_pb2.ToolResult] = Replies("calls", OUTSTANDING_MAX)

        def receive(request: dispatcher_pb2.CallToolsRequest) -> None:
            replies.expect(len(request.calls))
            for call in request.calls:
                self._take(call, replies)

        yield dispatcher_pb2.CallToolsResponse()
        async for response in serve_batches(
            requests, replies, receive=receive, frame=lambda items: dispatcher_pb2.CallToolsResponse(results=items)
        ):
            yield response

    async def CancelCalls(
        self, request: dispatcher_pb2.CancelCallsRequest, context: Any
    ) -> dispatcher_pb2.CancelCallsResponse:
        outcomes = []
        for call_id in request.call_ids:
            timer = self._timers.pop(call_id, None)
            found = timer is not None
            outcomes.append(dispatcher_pb2.CancelOutcome(call_id=call_id, found=found, acknowledged=found))
            if timer is not None:
                timer.cancel()
                stopped = types_pb2.TOOL_STATUS_CANCELLED
                self._answer(call_id, _failed("CANCELLED", "TOOL_CANCELLED", status=stopped))
        return dispatcher_pb2.CancelCallsResponse(outcomes=outcomes)

    def _take(self, call: dispatcher_pb2.ToolCall, replies: Replies[dispatcher_pb2.ToolResult]) -> None:
        self._asked.setdefault(call.call_id, []).append((call, replies))
        if call.call_id not in self._timers:
            self._timers[call.call_id] = self._loop.call_later(self._seconds * self._rng.random(), self._finish, call)

    def _finish(self, call: dispatcher_pb2.ToolCall) -> None:
        del self._timers[call.call_id]
        chance = self._rng.random()
        if chance < 0.05:
            # No worker was there for it, so that even an unsafe call may be made again.
            self._answer(call.call_id, _failed("UNAVAILABLE", "WORKER_UNAVAILABLE", attempts=0))
            return
        self._checker.tool_reached(call)
        if chance < 0.20:
            failed = _failed(self._rng.choice(("ABORTED", "UNAVAILABLE", "INVALID_ARGUMENT")), "TOOL_FAILED")
            if chance < 0.08:
                # So long that the run is given back meanwhile.
                failed.error.metadata["retry_after_seconds"] = "5"
            self._answer(call.call_id, failed)
        else:
            ok = dispatcher_pb2.ToolResult(status=types_pb2.TOOL_STATUS_OK, result=b"1", attempts=1)
            self._answer(call.call_id, ok)

    def _answer(self, call_id: str, result: dispatcher_pb2.ToolResult) -> None:
        for call, replies in self._asked.pop(call_id):
            answer = dispatcher_pb2.ToolResult(item_id=call.item_id, call_id=call_id)
            answer.MergeFrom(result)
            replies.put(answer)


def _failed(
    code: str,
    reason: str,
    *,
    attempts: int = 1,
    status: types_pb2.ToolStatus.ValueType = types_pb2.TOOL_STATUS_ERROR,
) -> dispatcher_pb2.ToolResult:
    error = types_pb2.RunError(code=code, reason=reason)
    return dispatcher_pb2.ToolResult(status=status, error=error, attempts=attempts)


class Bus:
    """Redis: what is published reaches who listens at that moment, in order; while it is down, nobody."""

    def __init__(self, loop: SimLoop, rng: Random, checker: Checker) -> None:
        self.is_down = False
        self.loss_share = 0.0
        self._loop = loop
        self._rng = rng
        self._checker = checker
        self.listeners: dict[Wire, asyncio.Queue[bytes]] = {}

    def publish(self, messages: Sequence[bytes]) -> None:
        """Hands messages to all who listen."""
        if self.is_down:
            raise ConnectionError("the bus is down")
        for message in messages:
            publication = hearing.unpack(message)
            if publication is not None and publication.kind == hearing.FRAME:
                self._checker.published(state_pb2.FollowResponse.FromString(publication.body).deliveries)
            for wire, queue in self.listeners.items():
                if self._rng.random() >= self.loss_share:
                    wire.last_arrival = max(wire.last_arrival + 1e-9, self._loop.now + self._rng.random() * 0.004)
                    self._loop.call_at(wire.last_arrival, queue.put_nowait, message, context=wire.process.context)


class Wire:
    """What `store.wire.Wire` is to a state process."""

    def __init__(self, bus: Bus) -> None:
        self.process = PROCESS.get()
        self.last_arrival = 0.0
        self._bus = bus

    async def publish(self, messages: Sequence[bytes]) -> None:
        """Sends messages."""
        self._bus.publish(messages)

    async def hear(self) -> AsyncIterator[bytes]:
        """All messages from now on."""
        if self._bus.is_down:
            raise ConnectionError("the bus is down")
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._bus.listeners[self] = queue
        try:
            yield b""
            while message := await queue.get():
                yield message
            raise ConnectionError("the bus went down")
        finally:
            self._bus.listeners.pop(self, None)

    async def close(self) -> None:
        """Nothing is held."""
