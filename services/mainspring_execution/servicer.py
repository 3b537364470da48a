"""ExecutionService as the wire sees it: unpacks requests, hands them to the runs, packs what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Final

from google.protobuf.message import Message
from mainspring.v1 import execution_pb2 as pb
from mainspring.v1 import execution_pb2_grpc as rpc
from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit.errors import from_status
from mainspring_kit.identity import UserExecutionContext, current_context, new_id
from mainspring_kit.interceptors import ServicerContext
from mainspring_kit.streams import Replies, serve_batches

from mainspring_execution.core.control import check_answer
from mainspring_execution.core.explain import explain, merge
from mainspring_execution.core.progress import fold
from mainspring_execution.core.repeats import again, fork_of, retry_of
from mainspring_execution.core.start import NO_ORIGIN, Origin, check_json, check_known_run_id
from mainspring_execution.engine.runs import Runs, draining
from mainspring_execution.peers import State

STARTS_PER_STREAM_MAX: Final = 8_192


class ExecutionServicer(rpc.ExecutionServiceServicer):
    """Starts, controls and explains runs."""

    def __init__(self, runs: Runs, state: State) -> None:
        self._runs = runs
        self._state = state
        self._streams: set[Replies[pb.StartResult]] = set()

    async def StartRun(self, request: pb.StartRunRequest, context: ServicerContext) -> pb.StartRunResponse:
        caller = current_context()
        caller = caller if caller.run_id else replace(caller, run_id=new_id())
        result = await self._start(caller, request)
        response = pb.StartRunResponse(run_id=result.run_id, state=result.state)
        if request.HasField("wait"):
            seconds = request.wait.ToNanoseconds() / 1e9
            response.run.CopyFrom(await self._state.wait_run(caller, result.run_id, seconds=seconds))
            response.state = response.run.state
        return response

    async def StartRuns(
        self, request_iterator: AsyncIterator[pb.StartRunsRequest], context: ServicerContext
    ) -> AsyncIterator[pb.StartRunsResponse]:
        if self._runs.is_draining:
            raise draining()  # a stream that stood would hold the process up until its drain time is over again
        replies: Replies[pb.StartResult] = Replies("StartRuns", STARTS_PER_STREAM_MAX)

        def receive(frame: pb.StartRunsRequest) -> None:
            if self._runs.is_draining:
                return  # left unanswered, so that the caller sends them to another executor
            replies.expect(len(frame.starts))
            for item in frame.starts:
                self._runs.start(item, replies.put)

        self._streams.add(replies)
        try:
            yield pb.StartRunsResponse()  # so that the caller knows that the stream stands
            async for frame in serve_batches(
                request_iterator, replies, receive=receive, frame=lambda results: pb.StartRunsResponse(results=results)
            ):
                yield frame
        finally:
            self._streams.discard(replies)
        if self._runs.is_draining:
            raise draining()

    async def CancelRun(self, request: pb.CancelRunRequest, context: ServicerContext) -> pb.CancelRunResponse:
        cancel = state_pb2.CancelInput(reason=request.reason)
        return pb.CancelRunResponse(run_id=await self._put_input(request.run_id, request.request_id, cancel=cancel))

    async def PauseRun(self, request: pb.PauseRunRequest, context: ServicerContext) -> pb.PauseRunResponse:
        pause = state_pb2.PauseInput(reason=request.reason)
        return pb.PauseRunResponse(run_id=await self._put_input(request.run_id, request.request_id, pause=pause))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: ServicerContext) -> pb.ResumeRunResponse:
        return pb.ResumeRunResponse(
            run_id=await self._put_input(request.run_id, request.request_id, resume=state_pb2.ResumeInput())
        )

    async def SignalRun(self, request: pb.SignalRunRequest, context: ServicerContext) -> pb.SignalRunResponse:
        signal = state_pb2.SignalInput(name=request.name, data=check_json(request.data, field="data"))
        return pb.SignalRunResponse(run_id=await self._put_input(request.run_id, request.request_id, signal=signal))

    async def ResolveApproval(
        self, request: pb.ResolveApprovalRequest, context: ServicerContext
    ) -> pb.ResolveApprovalResponse:
        approval = await self._state.get_approval(current_context(), request.approval_id)
        answer = state_pb2.ApprovalInput(
            approval_id=request.approval_id,
            decision=request.decision,
            data=check_answer(approval, request.decision, data=request.data),
        )
        run_id = await self._put_input(approval.run_id, request.request_id, approval=answer)
        return pb.ResolveApprovalResponse(run_id=run_id)

    async def RetryRun(self, request: pb.RetryRunRequest, context: ServicerContext) -> pb.RetryRunResponse:
        source = await self._get_run(request.run_id)
        caller = current_context()
        start = again(source, key=f"retry/{request.request_id or caller.request_id}")
        result = await self._start(replace(caller, run_id=new_id()), start, origin=retry_of(source))
        return pb.RetryRunResponse(run_id=result.run_id, state=result.state)

    async def ForkRun(self, request: pb.ForkRunRequest, context: ServicerContext) -> pb.ForkRunResponse:
        source = await self._get_run(request.run_id)
        caller = current_context()
        start = again(source, key=f"fork/{request.request_id or caller.request_id}")
        start.session_id = request.session_id or source.session_id
        start.version = request.version or source.agent_version
        result = await self._start(replace(caller, run_id=new_id()), start, origin=fork_of(source, seq=request.seq))
        return pb.ForkRunResponse(run_id=result.run_id, state=result.state)

    async def ExplainRun(self, request: pb.ExplainRunRequest, context: ServicerContext) -> pb.ExplainRunResponse:
        check_known_run_id(request.run_id)
        caller = current_context()
        known = await self._state.explain_run(caller, request.run_id)
        holds = list(known.holds)
        if known.run.last_seq and not known.run.HasField("end_time"):
            progress = fold(await self._state.read_events(caller, request.run_id))
            holds = merge(holds, explain(progress, executor_id=known.executor_id, now=time.time()))
        return pb.ExplainRunResponse(run=known.run, holds=holds, executor_id=known.executor_id)

    def end_streams(self) -> None:
        """Lets every StartRuns stream end once it has answered; callers turn to another executor then."""
        for replies in list(self._streams):
            replies.end()

    async def _start(
        self, caller: UserExecutionContext, start: pb.StartRunRequest, *, origin: Origin = NO_ORIGIN
    ) -> pb.StartResult:
        """Starts a run for the caller; what it is answered once the run is durable."""
        answered: asyncio.Future[pb.StartResult] = asyncio.get_running_loop().create_future()

        def reply(result: pb.StartResult) -> None:
            # A caller that has gone away gets no answer; the run goes on.
            if not answered.done():
                answered.set_result(result)

        self._runs.start(pb.StartItem(context=caller.to_message(), start=start), reply, origin=origin)
        result = await answered
        if result.status.code:
            raise from_status(result.status)
        return result

    async def _get_run(self, run_id: str) -> types_pb2.Run:
        check_known_run_id(run_id)
        return await self._state.get_run(current_context(), run_id)

    async def _put_input(self, run_id: str, request_id: str, **asked: Message) -> str:
        """Makes what is asked durable; the run's id. `asked` is one of the fields of PutInputRequest's oneof."""
        check_known_run_id(run_id)
        caller = current_context()
        request = state_pb2.PutInputRequest(
            run_id=run_id,
            request_id=request_id or caller.request_id,
            **asked,  # type: ignore[arg-type]  # one field of the oneof, by name
        )
        return (await self._state.put_input(caller, request)).run_id
