"""Whom the gateway calls: execution to start and cancel, state to read and follow, the registry for what exists."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Final, TypeVar, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from mainspring.v1 import (
    execution_pb2,
    execution_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    state_pb2,
    state_pb2_grpc,
    types_pb2,
)
from mainspring_kit.channel import Peer
from mainspring_kit.errors import MainspringError, Reason, from_rpc_error
from mainspring_kit.identity import ServiceTokens, UserExecutionContext
from mainspring_kit.streams import BROKEN_CALL, BatchPool, BidiCall, Outbox
from mainspring_kit.tasks import background

from mainspring_gateway.core.feeds import Order, combine

_WAIT_MARGIN_SECONDS: Final = 5

Starts = BatchPool[execution_pb2.StartItem, execution_pb2.StartResult]
Answer = TypeVar("Answer")


class Peers:
    """The services as the gateway sees them. Every unary call raises MainspringError."""

    def __init__(self, tokens: ServiceTokens, *, registry: str, execution: str, state: str) -> None:
        """Takes each service's target, `host:port[,host:port…]` or `dns:///name:port`."""
        self.registry = Peer(registry, tokens)
        self.execution = Peer(execution, tokens)
        self.state = Peer(state, tokens)
        self._registry = registry_pb2_grpc.RegistryServiceStub(self.registry.channel)
        self._execution = execution_pb2_grpc.ExecutionServiceStub(self.execution.channel)
        self._state = state_pb2_grpc.StateServiceStub(self.state.channel)
        self.starts: Starts = BatchPool(
            self.execution,
            "start_runs",
            open_call=self._open_starts,
            frame=lambda items: execution_pb2.StartRunsRequest(starts=items),
            unpack=lambda response: (response.results, ""),
        )
        self._closing = AsyncExitStack()

    async def __aenter__(self) -> Peers:
        for peer in (self.registry, self.execution, self.state):
            await self._closing.enter_async_context(peer)
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._closing.aclose()

    def reachable(self) -> dict[str, bool]:
        """Which services have a healthy instance now; asking makes idle channels connect."""
        peers = {"registry": self.registry, "execution": self.execution, "state": self.state}
        ready = grpc.ChannelConnectivity.READY
        return {name: peer.channel.get_state(try_to_connect=True) is ready for name, peer in peers.items()}

    async def control_run(
        self, context: UserExecutionContext, verb: str, *, run_id: str, reason: str = "", request_id: str = ""
    ) -> None:
        """Asks a run to `cancel`, `pause` or `resume`; durable when answered."""
        options = self.execution.call(context)
        call: Awaitable[object]
        if verb == "resume":
            resume = execution_pb2.ResumeRunRequest(run_id=run_id, request_id=request_id)
            call = self._execution.ResumeRun(resume, **options)
        elif verb == "pause":
            pause = execution_pb2.PauseRunRequest(run_id=run_id, reason=reason, request_id=request_id)
            call = self._execution.PauseRun(pause, **options)
        else:
            cancel = execution_pb2.CancelRunRequest(run_id=run_id, reason=reason, request_id=request_id)
            call = self._execution.CancelRun(cancel, **options)
        await _answer("execution", call)

    async def signal_run(self, context: UserExecutionContext, request: execution_pb2.SignalRunRequest) -> None:
        """Sends a run a signal; durable when answered."""
        await _answer("execution", self._execution.SignalRun(request, **self.execution.call(context)))

    async def resolve_approval(
        self, context: UserExecutionContext, request: execution_pb2.ResolveApprovalRequest
    ) -> execution_pb2.ResolveApprovalResponse:
        """Answers an approval; durable when answered."""
        return await _answer("execution", self._execution.ResolveApproval(request, **self.execution.call(context)))

    async def retry_run(
        self, context: UserExecutionContext, *, run_id: str, request_id: str = ""
    ) -> execution_pb2.RetryRunResponse:
        """Starts an ended run again."""
        request = execution_pb2.RetryRunRequest(run_id=run_id, request_id=request_id)
        return await _answer("execution", self._execution.RetryRun(request, **self.execution.call(context)))

    async def fork_run(
        self, context: UserExecutionContext, request: execution_pb2.ForkRunRequest
    ) -> execution_pb2.ForkRunResponse:
        """Starts a run from an event of another."""
        return await _answer("execution", self._execution.ForkRun(request, **self.execution.call(context)))

    async def explain_run(self, context: UserExecutionContext, run_id: str) -> execution_pb2.ExplainRunResponse:
        """Says why a run does not go on."""
        request = execution_pb2.ExplainRunRequest(run_id=run_id)
        return await _answer("execution", self._execution.ExplainRun(request, **self.execution.call(context)))

    async def get_approval(self, context: UserExecutionContext, approval_id: str) -> types_pb2.Approval:
        """Reads an approval."""
        request = state_pb2.GetApprovalRequest(approval_id=approval_id)
        return (await _answer("state", self._state.GetApproval(request, **self.state.call(context)))).approval

    async def list_approvals(
        self, context: UserExecutionContext, request: state_pb2.ListApprovalsRequest
    ) -> state_pb2.ListApprovalsResponse:
        """Lists approvals that the user may answer."""
        return await _answer("state", self._state.ListApprovals(request, **self.state.call(context)))

    async def list_run_metrics(
        self, context: UserExecutionContext, request: state_pb2.ListRunMetricsRequest
    ) -> state_pb2.ListRunMetricsResponse:
        """Lists what the tenant's runs cost."""
        return await _answer("state", self._state.ListRunMetrics(request, **self.state.call(context)))

    async def get_run(self, context: UserExecutionContext, run_id: str) -> types_pb2.Run:
        """Reads a run."""
        request = state_pb2.GetRunRequest(run_id=run_id)
        return (await _answer("state", self._state.GetRun(request, **self.state.call(context)))).run

    async def wait_run(self, context: UserExecutionContext, *, run_id: str, seconds: int) -> types_pb2.Run:
        """Reads a run when it has ended, or as it is when the time is over."""
        request = state_pb2.WaitRunRequest(run_id=run_id, timeout=Duration(seconds=seconds))
        options = self.state.call(context, timeout_seconds=seconds + _WAIT_MARGIN_SECONDS)
        return (await _answer("state", self._state.WaitRun(request, **options))).run

    async def list_runs(
        self, context: UserExecutionContext, request: state_pb2.ListRunsRequest
    ) -> state_pb2.ListRunsResponse:
        """Lists the user's runs."""
        return await _answer("state", self._state.ListRuns(request, **self.state.call(context)))

    async def read_events(
        self, context: UserExecutionContext, *, run_id: str, after_seq: int, page_size: int = 0
    ) -> state_pb2.ReadEventsResponse:
        """Reads a page of a run's log."""
        request = state_pb2.ReadEventsRequest(run_id=run_id, after_seq=after_seq, page_size=page_size)
        return await _answer("state", self._state.ReadEvents(request, **self.state.call(context)))

    async def list_sessions(
        self, context: UserExecutionContext, request: state_pb2.ListSessionsRequest
    ) -> state_pb2.ListSessionsResponse:
        """Lists the user's sessions."""
        return await _answer("state", self._state.ListSessions(request, **self.state.call(context)))

    async def register_agent(
        self, context: UserExecutionContext, document: bytes
    ) -> registry_pb2.RegisterAgentResponse:
        """Registers a version of an agent."""
        request = registry_pb2.RegisterAgentRequest(document=document)
        return await _answer("registry", self._registry.RegisterAgent(request, **self.registry.call(context)))

    async def get_agent(self, context: UserExecutionContext, *, name: str, version: str) -> types_pb2.Agent:
        """Reads a version of an agent."""
        request = registry_pb2.GetAgentRequest(name=name, version=version)
        return (await _answer("registry", self._registry.GetAgent(request, **self.registry.call(context)))).agent

    async def list_agents(
        self, context: UserExecutionContext, request: registry_pb2.ListAgentsRequest
    ) -> registry_pb2.ListAgentsResponse:
        """Lists the tenant's agents."""
        return await _answer("registry", self._registry.ListAgents(request, **self.registry.call(context)))

    async def list_tools(
        self, context: UserExecutionContext, request: registry_pb2.ListToolsRequest
    ) -> registry_pb2.ListToolsResponse:
        """Lists the tools that the tenant may call."""
        return await _answer("registry", self._registry.ListTools(request, **self.registry.call(context)))

    async def put_schedule(self, context: UserExecutionContext, document: bytes) -> registry_pb2.Schedule:
        """Stores a schedule."""
        request = registry_pb2.PutScheduleRequest(document=document)
        return (await _answer("registry", self._registry.PutSchedule(request, **self.registry.call(context)))).schedule

    async def get_schedule(self, context: UserExecutionContext, name: str) -> registry_pb2.Schedule:
        """Reads a schedule."""
        request = registry_pb2.GetScheduleRequest(name=name)
        return (await _answer("registry", self._registry.GetSchedule(request, **self.registry.call(context)))).schedule

    async def list_schedules(
        self, context: UserExecutionContext, request: registry_pb2.ListSchedulesRequest
    ) -> registry_pb2.ListSchedulesResponse:
        """Lists the tenant's schedules."""
        return await _answer("registry", self._registry.ListSchedules(request, **self.registry.call(context)))

    async def delete_schedule(self, context: UserExecutionContext, name: str) -> None:
        """Deletes a schedule."""
        request = registry_pb2.DeleteScheduleRequest(name=name)
        await _answer("registry", self._registry.DeleteSchedule(request, **self.registry.call(context)))

    async def follow(
        self,
        address: str,
        follower_id: str,
        *,
        outbox: Outbox[Order],
        receive: Callable[[state_pb2.FollowResponse], None],
    ) -> None:
        """Follows runs at one state instance until its stream ends; PEER_UNAVAILABLE when it breaks."""
        stub = state_pb2_grpc.StateServiceStub(self.state.instance_channel(address))
        call: BidiCall = stub.Follow(**self.state.stream())
        try:
            await call.wait_for_connection()
            await call.write(state_pb2.FollowRequest(follower_id=follower_id))
            async with background(_send_orders(call, outbox)):
                while (response := await call.read()) is not grpc.aio.EOF:
                    receive(cast(state_pb2.FollowResponse, response))
        except* grpc.RpcError as group:
            raise _first(group) from group
        except* BROKEN_CALL as group:
            raise MainspringError(
                Reason.PEER_UNAVAILABLE, f"The stream to state at {address} broke: it is opened again.", peer="state"
            ) from group
        finally:
            call.cancel()

    def _open_starts(self, channel: grpc.aio.Channel) -> BidiCall:
        stub = execution_pb2_grpc.ExecutionServiceStub(channel)
        call: BidiCall = stub.StartRuns(**self.execution.stream())
        return call


async def _send_orders(call: BidiCall, outbox: Outbox[Order]) -> None:
    while orders := await outbox.take():
        await call.write(combine(orders))


async def _answer(peer: str, call: Awaitable[Answer]) -> Answer:
    """The answer of a call. Its deadline is ours, not the client's: to the client the peer is unavailable."""
    try:
        return await call
    except grpc.RpcError as rpc_error:
        error = from_rpc_error(rpc_error)
        if not error.metadata and error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            error = MainspringError(
                Reason.PEER_UNAVAILABLE, f"The service {peer} did not answer in time: try again.", peer=peer
            )
        raise error from rpc_error


def _first(group: BaseExceptionGroup[grpc.RpcError]) -> MainspringError:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, grpc.RpcError):
        return from_rpc_error(first)
    return MainspringError(Reason.PEER_UNAVAILABLE, "The stream to state broke: it is opened again.", peer="state")
