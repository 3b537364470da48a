"""Whom execution calls: state for logs and leases, the dispatcher for tool calls, the registry for agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
from google.protobuf import duration_pb2
from mainspring.v1 import (
    dispatcher_pb2,
    dispatcher_pb2_grpc,
    events_pb2,
    registry_pb2,
    registry_pb2_grpc,
    state_pb2,
    state_pb2_grpc,
    types_pb2,
)
from mainspring_kit.channel import Peer
from mainspring_kit.errors import MainspringError, Reason, from_rpc_error
from mainspring_kit.identity import UserExecutionContext
from mainspring_kit.streams import BatchPool

# The peer gave no answer: nothing is known, so it is asked again.
UNREACHED: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

EVENTS_PAGE: Final = 1_000
TOOLS_PAGE: Final = 500
CANCEL_SECONDS: Final = 6.0
WAIT_MARGIN_SECONDS: Final = 5.0

AppendPool = BatchPool[state_pb2.Append, state_pb2.AppendResult]
CallPool = BatchPool[dispatcher_pb2.ToolCall, dispatcher_pb2.ToolResult]
# Streams of grpc.aio are generic over messages that their openers know: Any.
BeatCall = grpc.aio.StreamStreamCall[Any, Any]
DeltaCall = grpc.aio.StreamStreamCall[Any, Any]
ClaimCall = grpc.aio.UnaryStreamCall[Any, Any]
CatalogCall = grpc.aio.UnaryStreamCall[Any, Any]


@asynccontextmanager
async def _errors(peer: str) -> AsyncIterator[None]:
    """Turns a failed call's status into the platform's error. Its deadline is ours: who is late is unavailable."""
    try:
        yield
    except grpc.aio.AioRpcError as failed:
        error = from_rpc_error(failed)
        if not error.metadata and error.code in UNREACHED:
            error = MainspringError(Reason.PEER_UNAVAILABLE, f"The {peer} did not answer: try again.", peer=peer)
        raise error from failed


class State:
    """The state service as execution uses it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._stub = state_pb2_grpc.StateServiceStub(peer.channel)
        self.appends: AppendPool = BatchPool(
            peer,
            "state.Append",
            open_call=lambda channel: state_pb2_grpc.StateServiceStub(channel).Append(**peer.stream()),
            frame=lambda items: state_pb2.AppendRequest(appends=items),
            unpack=_unpack_appends,
        )

    async def addresses(self) -> list[str]:
        """The instances' addresses now."""
        return await self._peer.addresses()

    def open_heartbeat(self, address: str) -> BeatCall:
        """The beat's stream to one instance."""
        stub = state_pb2_grpc.StateServiceStub(self._peer.instance_channel(address))
        return stub.Heartbeat(**self._peer.stream())

    def open_claims(self, address: str, *, executor_id: str, credit: int) -> ClaimCall:
        """The stream of claimed runs from one instance."""
        stub = state_pb2_grpc.StateServiceStub(self._peer.instance_channel(address))
        request = state_pb2.ClaimRunsRequest(executor_id=executor_id, credit=credit)
        return stub.ClaimRuns(request, **self._peer.stream())

    def open_deltas(self, address: str) -> DeltaCall:
        """The stream of unfinished text to one instance."""
        stub = state_pb2_grpc.StateServiceStub(self._peer.instance_channel(address))
        return stub.PublishDeltas(**self._peer.stream())

    async def get_run(self, context: UserExecutionContext, run_id: str) -> types_pb2.Run:
        """One run of the context's user; RUN_NOT_FOUND."""
        async with _errors("state"):
            answer = await self._stub.GetRun(state_pb2.GetRunRequest(run_id=run_id), **self._peer.call(context))
        return answer.run

    async def explain_run(self, context: UserExecutionContext, run_id: str) -> state_pb2.GetRunResponse:
        """One run of the context's user, and why it does not go on as far as the database knows."""
        request = state_pb2.GetRunRequest(run_id=run_id, explain=True)
        async with _errors("state"):
            answer: state_pb2.GetRunResponse = await self._stub.GetRun(request, **self._peer.call(context))
        return answer

    async def get_approval(self, context: UserExecutionContext, approval_id: str) -> types_pb2.Approval:
        """One approval that the context's user may see; APPROVAL_NOT_FOUND."""
        request = state_pb2.GetApprovalRequest(approval_id=approval_id)
        async with _errors("state"):
            answer = await self._stub.GetApproval(request, **self._peer.call(context))
        return answer.approval

    async def wait_run(self, context: UserExecutionContext, run_id: str, *, seconds: float) -> types_pb2.Run:
        """The run when it has ended, or as it is after so many seconds."""
        timeout = duration_pb2.Duration()
        timeout.FromNanoseconds(int(seconds * 1e9))
        request = state_pb2.WaitRunRequest(run_id=run_id, timeout=timeout)
        async with _errors("state"):
            answer = await self._stub.WaitRun(
                request, **self._peer.call(context, timeout_seconds=seconds + WAIT_MARGIN_SECONDS)
            )
        return answer.run

    async def read_events(self, context: UserExecutionContext, run_id: str) -> list[events_pb2.RunEvent]:
        """A run's whole log."""
        events: list[events_pb2.RunEvent] = []
        while True:
            after_seq = events[-1].seq if events else 0
            request = state_pb2.ReadEventsRequest(run_id=run_id, after_seq=after_seq, page_size=EVENTS_PAGE)
            async with _errors("state"):
                page = await self._stub.ReadEvents(request, **self._peer.call(context))
            events.extend(page.events)
            if not page.events or events[-1].seq >= page.last_seq:
                return events

    async def list_history(
        self, context: UserExecutionContext, *, before_ordinal: int, runs_max: int
    ) -> list[types_pb2.Run]:
        """The session's completed runs before an ordinal, oldest first; the newest `runs_max` of them."""
        request = state_pb2.ListRunsRequest(
            session_id=context.session_id, states=[types_pb2.RUN_STATE_COMPLETED], page_size=runs_max
        )
        async with _errors("state"):
            page = await self._stub.ListRuns(request, **self._peer.call(context))
        return sorted((run for run in page.runs if run.ordinal < before_ordinal), key=lambda run: run.ordinal)

    async def put_input(self, context: UserExecutionContext, request: state_pb2.PutInputRequest) -> state_pb2.RunInput:
        """Makes what is asked of a run durable."""
        async with _errors("state"):
            answer = await self._stub.PutInput(request, **self._peer.call(context))
        return answer.input


class Dispatcher:
    """The dispatcher as execution uses it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.calls: CallPool = BatchPool(
            peer,
            "dispatcher.CallTools",
            open_call=lambda channel: dispatcher_pb2_grpc.DispatcherServiceStub(channel).CallTools(**peer.stream()),
            frame=lambda items: dispatcher_pb2.CallToolsRequest(calls=items),
            unpack=lambda response: (response.results, ""),
            lost=_lost_call,
        )

    async def cancel(
        self, call_ids: Sequence[str], *, tenant_id: str, timeout_seconds: float = CANCEL_SECONDS
    ) -> dict[str, dispatcher_pb2.CancelOutcome]:
        """Cancels calls wherever they are under way; what could not be asked is missing in the answer."""
        request = dispatcher_pb2.CancelCallsRequest(tenant_id=tenant_id, call_ids=call_ids)
        asked = []
        for address in await self._peer.addresses():
            stub = dispatcher_pb2_grpc.DispatcherServiceStub(self._peer.instance_channel(address))
            options = self._peer.call(timeout_seconds=timeout_seconds)
            options["wait_for_ready"] = False
            asked.append(stub.CancelCalls(request, **options))
        outcomes: dict[str, dispatcher_pb2.CancelOutcome] = {}
        for answer in asked:
            try:
                found = (await answer).outcomes
            except grpc.aio.AioRpcError:
                # A dispatcher that cannot be asked acknowledges nothing; the receipt says so.
                continue
            for outcome in found:
                if outcome.found or outcome.call_id not in outcomes:
                    outcomes[outcome.call_id] = outcome
        return outcomes


class Registry:
    """The registry as execution uses it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._stub = registry_pb2_grpc.RegistryServiceStub(peer.channel)

    def watch(self, after_revision: int) -> CatalogCall:
        """The stream of the catalog's changes."""
        request = registry_pb2.WatchCatalogRequest(after_revision=after_revision)
        return self._stub.WatchCatalog(request, **self._peer.stream())

    async def resolve(self, context: UserExecutionContext, name: str, *, alias: str, version: str) -> types_pb2.Agent:
        """The version to run; AGENT_NOT_FOUND, VERSION_NOT_FOUND."""
        request = registry_pb2.ResolveAgentRequest(name=name, alias=alias, version=version)
        async with _errors("registry"):
            answer = await self._stub.ResolveAgent(request, **self._peer.call(context))
        return answer.agent

    async def get_limits(self, context: UserExecutionContext) -> registry_pb2.TenantLimits:
        """The limits of the context's tenant; TENANT_NOT_FOUND: it has none."""
        async with _errors("registry"):
            answer = await self._stub.GetTenant(registry_pb2.GetTenantRequest(), **self._peer.call(context))
        return answer.tenant.limits

    async def list_tools(self, context: UserExecutionContext) -> list[types_pb2.Tool]:
        """All tools that the context's tenant may call."""
        tools: list[types_pb2.Tool] = []
        request = registry_pb2.ListToolsRequest(page_size=TOOLS_PAGE)
        while True:
            async with _errors("registry"):
                page = await self._stub.ListTools(request, **self._peer.call(context))
            tools.extend(page.tools)
            request.page_token = page.next_page_token
            if not request.page_token:
                return tools


def _unpack_appends(response: state_pb2.AppendResponse) -> tuple[Iterable[state_pb2.AppendResult], str]:
    return response.results, response.state_id


def _lost_call(call: dispatcher_pb2.ToolCall) -> dispatcher_pb2.ToolResult | None:
    """An unsafe call is never sent a second time: when its stream breaks, nobody knows what it did."""
    if call.effect != types_pb2.EFFECT_CLASS_UNSAFE:
        return None
    error = types_pb2.RunError(
        code="UNAVAILABLE",
        reason=Reason.WORKER_LOST.name,
        message=f"The dispatcher went away while {call.tool} ran: what it did is not known, look before you retry.",
        metadata={"tool": call.tool, "call_id": call.call_id},
    )
    return dispatcher_pb2.ToolResult(
        item_id=call.item_id, call_id=call.call_id, status=types_pb2.TOOL_STATUS_ERROR, error=error, attempts=1
    )


async def first_of(addresses: Sequence[str], *, attempt: int) -> str:
    """The address to try at this attempt: each in turn; waits a moment where there is none."""
    if not addresses:
        await asyncio.sleep(0.2)
        return ""
    return addresses[attempt % len(addresses)]
