"""ExecutionService as the wire sees it: unpacks requests, hands them to the runs, packs what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Final

from mainspring.v1 import execution_pb2 as pb
from mainspring.v1 import execution_pb2_grpc as rpc
from mainspring_kit.errors import from_status
from mainspring_kit.identity import current_context, new_id
from mainspring_kit.interceptors import ServicerContext
from mainspring_kit.streams import Replies, serve_batches

from mainspring_execution.core.start import is_run_id, run_not_found
from mainspring_execution.engine.runs import Runs, draining
from mainspring_execution.peers import State

STARTS_PER_STREAM_MAX: Final = 8_192


class ExecutionServicer(rpc.ExecutionServiceServicer):
    """StartRun, StartRuns, CancelRun. The rest comes later."""

    def __init__(self, runs: Runs, state: State) -> None:
        self._runs = runs
        self._state = state
        self._streams: set[Replies[pb.StartResult]] = set()

    async def StartRun(self, request: pb.StartRunRequest, context: ServicerContext) -> pb.StartRunResponse:
        caller = current_context()
        caller = caller if caller.run_id else replace(caller, run_id=new_id())
        answered: asyncio.Future[pb.StartResult] = asyncio.get_running_loop().create_future()

        def reply(result: pb.StartResult) -> None:
            # A caller that has gone away gets no answer; the run goes on.
            if not answered.done():
                answered.set_result(result)

        self._runs.start(pb.StartItem(context=caller.to_message(), start=request), reply)
        result = await answered
        if result.status.code:
            raise from_status(result.status)
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
        if not is_run_id(request.run_id):
            raise run_not_found(request.run_id)
        caller = current_context()
        stored = await self._state.put_cancel(
            caller, request.run_id, request_id=request.request_id or caller.request_id, reason=request.reason
        )
        return pb.CancelRunResponse(run_id=stored.run_id)

    def end_streams(self) -> None:
        """Lets every StartRuns stream end once it has answered; callers turn to another executor then."""
        for replies in list(self._streams):
            replies.end()
