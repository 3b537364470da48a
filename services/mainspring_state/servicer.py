"""What the wire sees of state: unpack, call, pack."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

from mainspring.v1 import state_pb2, state_pb2_grpc, types_pb2
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import current_context, current_principal, new_id
from mainspring_kit.interceptors import ServicerContext

from mainspring_state.core import pages
from mainspring_state.core.approvals import read_id
from mainspring_state.core.creation import is_uuid
from mainspring_state.core.inputs import approval_not_found, is_expiry, read_input
from mainspring_state.core.privacy import public
from mainspring_state.engine.root import Engine
from mainspring_state.store.reads import FIRST_SESSIONS, RunFilter, SessionMark
from mainspring_state.store.rows import to_event

EVENTS_PAGE_MAX = 1_000
EVENTS_PAGE_BYTES_MAX = 2 << 20
PAGE_SIZE_DEFAULT = 50
WAIT_SECONDS_MAX = 300.0
# What is left of a call's deadline for the answer itself.
ANSWER_SECONDS = 0.25


class StateServicer(state_pb2_grpc.StateServiceServicer):
    """The rpcs of StateService that are built; the others answer NOT_IMPLEMENTED by themselves."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Append(
        self, request_iterator: AsyncIterator[state_pb2.AppendRequest], context: ServicerContext
    ) -> AsyncIterator[state_pb2.AppendResponse]:
        async for response in self._engine.append(request_iterator):
            yield response

    async def PutInput(
        self, request: state_pb2.PutInputRequest, context: ServicerContext
    ) -> state_pb2.PutInputResponse:
        user = current_context()
        run_input = read_input(
            request, request_id=request.request_id or user.request_id or new_id(), user_id=user.user_id
        )
        is_holder = is_expiry(run_input, is_service=current_principal().is_service)
        stored = await self._engine.executors.put_input(user, run_input, is_holder=is_holder)
        return state_pb2.PutInputResponse(input=stored)

    async def ClaimRuns(
        self, request: state_pb2.ClaimRunsRequest, context: ServicerContext
    ) -> AsyncIterator[state_pb2.ClaimRunsResponse]:
        async for response in self._engine.executors.claim(request):
            yield response

    async def Heartbeat(
        self, request_iterator: AsyncIterator[state_pb2.HeartbeatRequest], context: ServicerContext
    ) -> AsyncIterator[state_pb2.HeartbeatResponse]:
        async for response in self._engine.executors.heartbeat(request_iterator):
            yield response

    async def PublishDeltas(
        self, request_iterator: AsyncIterator[state_pb2.PublishDeltasRequest], context: ServicerContext
    ) -> AsyncIterator[state_pb2.PublishDeltasResponse]:
        async for response in self._engine.publish_deltas(request_iterator):
            yield response

    async def Follow(
        self, request_iterator: AsyncIterator[state_pb2.FollowRequest], context: ServicerContext
    ) -> AsyncIterator[state_pb2.FollowResponse]:
        async for response in self._engine.follow(request_iterator):
            yield response

    async def GetRun(self, request: state_pb2.GetRunRequest, context: ServicerContext) -> state_pb2.GetRunResponse:
        user = current_context()
        run = await self._engine.get_run(user, request.run_id)
        if not request.explain:
            return state_pb2.GetRunResponse(run=run)
        holds, executor_id = await self._engine.explain(user, run)
        return state_pb2.GetRunResponse(run=run, holds=holds, executor_id=executor_id)

    async def ListRuns(
        self, request: state_pb2.ListRunsRequest, context: ServicerContext
    ) -> state_pb2.ListRunsResponse:
        size = request.page_size or PAGE_SIZE_DEFAULT
        runs = await self._engine.reads.list_runs(
            current_context(),
            RunFilter(request.session_id, request.agent, list(request.states), request.parent_run_id),
            before_run_id=pages.read_run_token(request.page_token),
            page_size=size + 1,
        )
        token = runs[size - 1].run_id if len(runs) > size else ""
        return state_pb2.ListRunsResponse(runs=runs[:size], next_page_token=token)

    async def WaitRun(self, request: state_pb2.WaitRunRequest, context: ServicerContext) -> state_pb2.WaitRunResponse:
        left = context.time_remaining()
        seconds = WAIT_SECONDS_MAX if left is None else max(0.0, left - ANSWER_SECONDS)
        if request.HasField("timeout"):
            seconds = min(seconds, request.timeout.ToNanoseconds() / 1e9)
        run = await self._engine.wait_run(current_context(), request.run_id, timeout_seconds=seconds)
        return state_pb2.WaitRunResponse(run=run)

    async def ReadEvents(
        self, request: state_pb2.ReadEventsRequest, context: ServicerContext
    ) -> state_pb2.ReadEventsResponse:
        user = current_context()
        run = await self._engine.get_run(user, request.run_id)
        events = await self._engine.reads.read_events(
            user,
            run.run_id,
            after_seq=request.after_seq,
            item_max=request.page_size or EVENTS_PAGE_MAX,
            byte_max=EVENTS_PAGE_BYTES_MAX,
        )
        page = [to_event(event) for event in events]
        if not current_principal().is_service:
            page = public(page)
        last_seq = max(run.last_seq, page[-1].seq if page else 0)
        return state_pb2.ReadEventsResponse(events=page, last_seq=last_seq)

    async def CreateSession(
        self, request: state_pb2.CreateSessionRequest, context: ServicerContext
    ) -> state_pb2.CreateSessionResponse:
        session_id = request.session_id or new_id()
        session, is_own = await self._engine.reads.create_session(
            current_context(),
            session_id,
            policy=request.policy or types_pb2.SESSION_POLICY_ENQUEUE,
            title=request.title,
        )
        if not is_own:
            raise MainspringError(
                Reason.SESSION_EXISTS,
                f"There is a session {session_id!r} already: use it, or choose another id.",
                session_id=session_id,
            )
        return state_pb2.CreateSessionResponse(session=session)

    async def GetSession(
        self, request: state_pb2.GetSessionRequest, context: ServicerContext
    ) -> state_pb2.GetSessionResponse:
        session = await self._engine.reads.get_session(current_context(), request.session_id)
        if session is None:
            raise MainspringError(
                Reason.SESSION_NOT_FOUND,
                f"There is no session {request.session_id!r}: check the id.",
                session_id=request.session_id,
            )
        return state_pb2.GetSessionResponse(session=session)

    async def ListSessions(
        self, request: state_pb2.ListSessionsRequest, context: ServicerContext
    ) -> state_pb2.ListSessionsResponse:
        size = request.page_size or PAGE_SIZE_DEFAULT
        mark = FIRST_SESSIONS
        if request.page_token:
            microseconds, session_id = pages.read_session_token(request.page_token)
            mark = SessionMark(datetime.fromtimestamp(microseconds / 1e6, UTC), session_id)
        sessions = await self._engine.reads.list_sessions(current_context(), before=mark, page_size=size + 1)
        token = pages.session_token(sessions[size - 1]) if len(sessions) > size else ""
        return state_pb2.ListSessionsResponse(sessions=sessions[:size], next_page_token=token)

    async def GetApproval(
        self, request: state_pb2.GetApprovalRequest, context: ServicerContext
    ) -> state_pb2.GetApprovalResponse:
        known = read_id(request.approval_id)
        approval = None
        if known is not None:
            approval = await self._engine.oversight.get_approval(current_context(), known[0], seq=known[1])
        if approval is None:
            raise approval_not_found(request.approval_id)
        return state_pb2.GetApprovalResponse(approval=approval)

    async def ListApprovals(
        self, request: state_pb2.ListApprovalsRequest, context: ServicerContext
    ) -> state_pb2.ListApprovalsResponse:
        size = request.page_size or PAGE_SIZE_DEFAULT
        before = pages.read_approval_token(request.page_token)
        run_id = request.run_id.lower()
        if run_id and not is_uuid(run_id):
            return state_pb2.ListApprovalsResponse()
        approvals = await self._engine.oversight.list_approvals(
            current_context(),
            run_id=run_id,
            is_open=not request.include_resolved,
            before=before,
            page_size=size + 1,
        )
        token = pages.approval_token(approvals[size - 1]) if len(approvals) > size else ""
        return state_pb2.ListApprovalsResponse(approvals=approvals[:size], next_page_token=token)

    async def ListRunMetrics(
        self, request: state_pb2.ListRunMetricsRequest, context: ServicerContext
    ) -> state_pb2.ListRunMetricsResponse:
        size = request.page_size or PAGE_SIZE_DEFAULT
        before_run_id = pages.read_run_token(request.page_token)
        run_id = request.run_id.lower()
        if run_id and not is_uuid(run_id):
            return state_pb2.ListRunMetricsResponse()
        metrics = await self._engine.oversight.list_metrics(
            current_context(),
            agent=request.agent,
            run_id=run_id,
            since_run_id=pages.first_run_id(request.since),
            before_run_id=before_run_id,
            page_size=size + 1,
        )
        token = metrics[size - 1].run_id if len(metrics) > size else ""
        return state_pb2.ListRunMetricsResponse(metrics=metrics[:size], next_page_token=token)
