"""The calls that a worker runs: at most so many at once, one execution per call_id whoever asks, always one outcome."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

from pydantic import ValidationError

from mainspring.errors import ToolError
from mainspring.tool import Declaration, ToolContext, to_json
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring.worker.logs import note

RESULT_BYTES_MAX: Final = 16 << 20
MESSAGE_CHARACTERS_MAX: Final = 2_000


class Sink(Protocol):
    """Where a call came from and its outcome goes."""

    def put(self, result: pb.WorkerResult) -> None:
        """Takes an outcome."""

    def acknowledge(self, call_id: str) -> None:
        """Takes the word that a cancel took effect."""


@dataclass(slots=True, eq=False)
class _Running:
    """One execution and all dispatches that wait for it."""

    call: pb.WorkerCall
    wanted: list[tuple[Sink, int]]
    context: ToolContext | None = None
    is_cancelled: bool = False
    # Set while it may be stopped: moving its deadline to now is how a cancel reaches the coroutine.
    scope: asyncio.Timeout | None = None
    started: float = field(default_factory=time.perf_counter)

    def ask_to_end(self) -> None:
        """Tells a function that looks at its context."""
        if self.context is not None:
            self.context.cancel_flag.set()


class Calls:
    """Runs calls as tasks of the group it is given."""

    def __init__(
        self, tools: Mapping[str, Declaration], tasks: asyncio.TaskGroup, *, concurrency: int, threads: int
    ) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self._tools = tools
        self._tasks = tasks
        self._places = asyncio.Semaphore(concurrency)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tool")
        self._threads_busy: set[Future[bytes]] = set()
        self._running: dict[tuple[str, str], _Running] = {}
        self._dispatches: dict[tuple[Sink, int], _Running] = {}

    @property
    def in_flight(self) -> int:
        """How many executions are under way."""
        return len(self._running)

    def start(self, call: pb.WorkerCall, sink: Sink) -> None:
        """Begins a call; one whose call_id is under way already gets the outcome of that execution."""
        identity = (call.context.tenant_id, call.call_id)
        running = self._running.get(identity)
        if running is None:
            running = self._running[identity] = _Running(call, [])
            self.idle.clear()
            self._tasks.create_task(self._run(running))
        running.wanted.append((sink, call.dispatch_id))
        self._dispatches[sink, call.dispatch_id] = running

    def dispatches_of(self, sink: Sink) -> list[int]:
        """Which of a sink's dispatches are under way."""
        return [dispatch_id for owner, dispatch_id in self._dispatches if owner is sink]

    def cancel(self, dispatch_id: int, sink: Sink) -> None:
        """Ends an execution: a coroutine is cancelled, a thread is asked through its context."""
        running = self._dispatches.get((sink, dispatch_id))
        if running is None:
            return  # it has ended; its outcome is on the way
        running.is_cancelled = True
        if running.scope is not None:
            running.scope.reschedule(asyncio.get_running_loop().time())

    def close(self) -> int:
        """Takes no more work into threads and asks those that run to end; answers how many do."""
        for running in self._running.values():
            running.ask_to_end()
        self._threads.shutdown(wait=False, cancel_futures=True)
        return len(self._threads_busy)

    async def _run(self, running: _Running) -> None:
        result = await self._outcome(running)
        result.duration_ms = (time.perf_counter() - running.started) * 1e3
        call = running.call
        del self._running[call.context.tenant_id, call.call_id]
        for sink, dispatch_id in running.wanted:
            del self._dispatches[sink, dispatch_id]
            if result.status == types_pb2.TOOL_STATUS_CANCELLED:
                sink.acknowledge(call.call_id)
            copy = result if len(running.wanted) == 1 else _copy(result)
            copy.dispatch_id = dispatch_id
            sink.put(copy)
        if not self._running:
            self.idle.set()

    async def _outcome(self, running: _Running) -> pb.WorkerResult:
        call = running.call
        declaration = self._tools.get(call.tool)
        if declaration is None:
            return _failed(call, code="NOT_FOUND", reason="TOOL_NOT_FOUND", message=f"This worker has no {call.tool}.")
        seconds = call.timeout.ToNanoseconds() / 1e9 if call.HasField("timeout") else declaration.timeout_seconds
        if running.is_cancelled:
            return _stopped(running, seconds)  # before it began
        scope = asyncio.timeout(seconds)
        try:
            async with scope:
                running.scope = scope
                async with self._places:
                    running.started = time.perf_counter()
                    body = await self._execute(declaration, running)
        except _ArgumentsError as error:
            return _invalid(call, error.cause)
        except ToolError as error:
            return _raised(call, error)
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise  # the worker is stopping
            return _failed(call, message=f"It awaited something that was cancelled: {error!r}.")
        except (Exception, SystemExit) as error:  # whatever the user's function raises is the call's outcome
            if scope.expired() and isinstance(error, TimeoutError):
                return _stopped(running, seconds)
            note(logging.WARNING, "tool_failed", error=error, tool=call.tool, call_id=call.call_id)
            return _failed(call, message=f"{type(error).__name__}: {error}")
        finally:
            running.scope = None
        if len(body) > RESULT_BYTES_MAX:
            return _too_large(call, len(body))
        return pb.WorkerResult(status=types_pb2.TOOL_STATUS_OK, result=body)

    async def _execute(self, declaration: Declaration, running: _Running) -> bytes:
        try:
            arguments = declaration.arguments.validate_json(running.call.arguments or b"{}")
        except ValidationError as error:
            raise _ArgumentsError(error) from error
        if declaration.context_parameter:
            arguments[declaration.context_parameter] = running.context = ToolContext.of(running.call)
        if declaration.is_async:
            return to_json(await declaration.function(**arguments))
        return await self._execute_in_thread(partial(declaration.function, **arguments), running)

    async def _execute_in_thread(self, function: Callable[[], Any], running: _Running) -> bytes:
        future = self._threads.submit(contextvars.copy_context().run, _call, function)
        self._threads_busy.add(future)
        future.add_done_callback(self._threads_busy.discard)
        waiter = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            running.ask_to_end()
            if not future.cancel():
                # The thread runs on, so the call has not ended: it keeps its place and is not reported as stopped.
                await asyncio.wait([waiter])
            raise


class _ArgumentsError(Exception):
    """The arguments do not match; apart from a ValidationError that the tool itself may raise."""

    def __init__(self, cause: ValidationError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _call(function: Callable[[], Any]) -> bytes:
    """In a thread: the function and the making of its JSON."""
    try:
        return to_json(function())
    except StopIteration as error:
        # A future cannot hold it.
        raise RuntimeError("the tool raised StopIteration") from error


def _failed(
    call: pb.WorkerCall,
    *,
    message: str,
    code: str = "UNKNOWN",
    reason: str = "TOOL_FAILED",
    status: types_pb2.ToolStatus.ValueType = types_pb2.TOOL_STATUS_ERROR,
    metadata: Mapping[str, str] | None = None,
) -> pb.WorkerResult:
    error = types_pb2.RunError(
        code=code,
        reason=reason,
        message=message[:MESSAGE_CHARACTERS_MAX],
        metadata={"tool": call.tool, **(metadata or {})},
    )
    return pb.WorkerResult(status=status, error=error)


def _raised(call: pb.WorkerCall, error: ToolError) -> pb.WorkerResult:
    return _failed(call, code=error.code, reason=error.reason, message=error.message, metadata=error.metadata)


def _invalid(call: pb.WorkerCall, error: ValidationError) -> pb.WorkerResult:
    fault = error.errors(include_url=False, include_input=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    where = f"{path}: " if path else ""
    return _failed(
        call,
        code="INVALID_ARGUMENT",
        reason="TOOL_ARGUMENTS_INVALID",
        message=f"The arguments of {call.tool} do not match its schema: {where}{fault['msg']}. Mend them.",
        metadata={"path": path},
    )


def _stopped(running: _Running, seconds: float) -> pb.WorkerResult:
    call = running.call
    if running.is_cancelled:
        return _failed(
            call,
            code="CANCELLED",
            reason="TOOL_CANCELLED",
            message=f"The call {call.call_id} of {call.tool} was cancelled.",
            status=types_pb2.TOOL_STATUS_CANCELLED,
            metadata={"call_id": call.call_id},
        )
    return _failed(
        call,
        code="DEADLINE_EXCEEDED",
        reason="TOOL_TIMED_OUT",
        message=f"The tool {call.tool} did not answer within {seconds:g} s: give it more time.",
        status=types_pb2.TOOL_STATUS_TIMED_OUT,
        metadata={"timeout_seconds": f"{seconds:g}"},
    )


def _too_large(call: pb.WorkerCall, size: int) -> pb.WorkerResult:
    return _failed(
        call,
        code="RESOURCE_EXHAUSTED",
        reason="PAYLOAD_TOO_LARGE",
        message=f"The result of {call.tool} has {size} bytes, at most {RESULT_BYTES_MAX} may be: return a reference.",
        metadata={"field": "result", "bytes": str(size), "limit": str(RESULT_BYTES_MAX)},
    )


def _copy(result: pb.WorkerResult) -> pb.WorkerResult:
    copy = pb.WorkerResult()
    copy.CopyFrom(result)
    return copy
