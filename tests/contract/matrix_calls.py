"""What the contract matrix walks: every rpc of the descriptors, a right request for each that is built, the wire."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Final

import grpc
import orjson
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from mainspring.v1 import dispatcher_pb2, execution_pb2, identity_pb2, registry_pb2, state_pb2, types_pb2
from mainspring_dispatcher.servicer import DispatcherServicer
from mainspring_execution.servicer import ExecutionServicer
from mainspring_kit.channel import MESSAGE_BYTES_MAX
from mainspring_kit.errors import MainspringError, from_rpc_error
from mainspring_kit.identity import ROLE_NAMES, UserExecutionContext, new_id
from mainspring_registry.servicer import RegistryServicer
from mainspring_state.servicer import StateServicer

from test_framework.agents import call, echo_agent, scripted_agent, step
from test_framework.grpc_testing import descriptor_of, stub_class
from test_framework.identities import Identities, Metadata, make_context, unique
from test_framework.stack import Stack
from test_framework.waiting import wait_until_blocking

CALL_SECONDS: Final = 20.0
# A claim stream says nothing while there is nothing to claim.
SILENT: Final = {"ClaimRuns"}
SILENT_SECONDS: Final = 0.5
SLOW_AGENT: Final = "slow"
ASKING_AGENT: Final = "asking"
FAILING_AGENT: Final = "failing"
SCHEDULE: Final = "nightly"
# What is asked of a run under way.
CONTROLS: Final = (
    execution_pb2.CancelRunRequest,
    execution_pb2.PauseRunRequest,
    execution_pb2.ResumeRunRequest,
    execution_pb2.SignalRunRequest,
)
# More than any message may have; the client does not mind.
LARGE_BYTES: Final = MESSAGE_BYTES_MAX + 1
_OPTIONS: Final = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))

_SERVICERS: Final = {
    "Registry": RegistryServicer,
    "Dispatcher": DispatcherServicer,
    "Execution": ExecutionServicer,
    "State": StateServicer,
}


@dataclass(frozen=True)
class Rpc:
    """One rpc of a service; `is_built`: this release serves it."""

    service: str
    method: MethodDescriptor
    is_built: bool

    def __str__(self) -> str:
        return f"{self.service}.{self.name}"

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def path(self) -> str:
        """What the wire and the metadata of errors call it."""
        return f"/mainspring.v1.{self.service}Service/{self.name}"

    @property
    def role(self) -> str:
        """The least role by its name; `service` for services only."""
        number = self.method.GetOptions().Extensions[identity_pb2.role]
        return identity_pb2.Role.Name(number).removeprefix("ROLE_").lower()

    @property
    def is_stream(self) -> bool:
        """Whether either side streams."""
        return self.method.client_streaming or self.method.server_streaming

    @cached_property
    def request_class(self) -> type[Message]:
        """The generated class of its request."""
        return GetMessageClass(self.method.input_type)


def _rpcs() -> Iterator[Rpc]:
    for service, servicer in _SERVICERS.items():
        for method in descriptor_of(f"mainspring.v1.{service}Service").methods:
            yield Rpc(service, method, method.name in vars(servicer))


RPCS: Final = tuple(_rpcs())
BUILT: Final = tuple(rpc for rpc in RPCS if rpc.is_built)
UNBUILT: Final = tuple(rpc for rpc in RPCS if not rpc.is_built)
UNARY: Final = tuple(rpc for rpc in BUILT if not rpc.is_stream)


class Wire:
    """The running services, and how any of their rpcs is called."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.identities: Identities = stack.identities
        self._channels = {
            name: grpc.insecure_channel(addresses[0], options=_OPTIONS) for name, addresses in stack.services.items()
        }

    def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels.values():
            channel.close()

    def stub(self, service: str) -> Any:
        """Any: generated stubs have no common base."""
        return stub_class(service)(self._channels[service.lower()])

    def channel(self, rpc: Rpc) -> grpc.Channel:
        """The channel to the rpc's service."""
        return self._channels[rpc.service.lower()]

    def metadata(self, rpc: Rpc, user: UserExecutionContext) -> Metadata:
        """Of the user with the least role that the rpc takes, or of a service."""
        if rpc.role == "service":
            return self.identities.service_metadata()
        return self.identities.metadata(user.tenant_id, user.user_id, rpc.role)

    def open(self, rpc: Rpc, requests: Iterable[Message], metadata: Metadata, *, seconds: float = CALL_SECONDS) -> Any:
        """Opens the call; its answers are iterated over. Any: grpc's calls have no types of their own."""
        multi = getattr(self.stub(rpc.service), rpc.name)
        if rpc.method.client_streaming:
            return multi(iter(requests), metadata=metadata, timeout=seconds)
        (request,) = requests
        if rpc.method.server_streaming:
            return multi(request, metadata=metadata, timeout=seconds)
        return iter([multi(request, metadata=metadata, timeout=seconds)])

    def answers(self, rpc: Rpc, requests: Iterable[Message], metadata: Metadata) -> list[Any]:
        """All answers of a call that ends when it has answered all."""
        return list(self.open(rpc, requests, metadata))

    def answer(self, rpc: Rpc, request: Message, metadata: Metadata) -> Any:
        """The first answer, or None where there is nothing to say; raises the error of the call."""
        is_silent = rpc.name in SILENT
        try:
            call = self.open(rpc, [request], metadata, seconds=SILENT_SECONDS if is_silent else CALL_SECONDS)
            first = next(call, None)
        except grpc.RpcError as error:
            if is_silent and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            raise
        if rpc.is_stream:
            call.cancel()
        return first

    def fault(self, rpc: Rpc, request: Message, metadata: Metadata) -> MainspringError | None:
        """What the call is refused with; None: it is answered."""
        try:
            self.answer(rpc, request, metadata)
        except grpc.RpcError as error:
            return from_rpc_error(error)
        return None

    def reason(self, rpc: Rpc, request: Message, metadata: Metadata) -> str:
        """The reason of the refusal, or nothing."""
        fault = self.fault(rpc, request, metadata)
        return fault.reason_name if fault is not None else ""


@dataclass(frozen=True, slots=True)
class World:
    """A user with an agent, a finished run in a session of the run's own, and right requests about all of them."""

    wire: Wire
    user: UserExecutionContext
    agent: str
    run_id: str

    @classmethod
    def make(cls, wire: Wire) -> World:
        """A tenant of its own on the running services."""
        user = make_context(session_id=unique("session"))
        world = cls(wire, user, "echo", "")
        register, start = rpc_named("RegisterAgent"), rpc_named("StartRun")
        slow = scripted_agent(SLOW_AGENT, step("I take my time.", delay="5s", result=1))
        asking = scripted_agent(ASKING_AGENT, step("May I?", call("human.approve", title="May I?")))
        failing = scripted_agent(FAILING_AGENT, step("No.", fail={"code": "INVALID_ARGUMENT", "message": "No."}))
        for spec in (echo_agent(world.agent), slow, asking, failing):
            document = orjson.dumps(spec)
            wire.answer(register, registry_pb2.RegisterAgentRequest(document=document), world.metadata(register))
        request = execution_pb2.StartRunRequest(agent=world.agent, input=b'{"value": 1}', session_id=user.session_id)
        request.wait.FromSeconds(int(CALL_SECONDS))
        run = wire.answer(start, request, world.metadata(start)).run
        assert run.state == types_pb2.RUN_STATE_COMPLETED, run
        return cls(wire, user, world.agent, run.run_id)

    def metadata(self, rpc: Rpc) -> Metadata:
        """The user's own, where users may call."""
        return self.wire.metadata(rpc, self.user)

    def on_behalf(self, context: UserExecutionContext | None = None) -> Metadata:
        """A service's, for the user or for another."""
        return self.wire.identities.service_metadata(context or self.user)

    def request(self, rpc: Rpc) -> Message:
        """A request that is answered without an error."""
        made = self._requests()[rpc.name]
        assert isinstance(made, rpc.request_class)
        if isinstance(made, (state_pb2.PutInputRequest, *CONTROLS)):
            made.run_id = self.start()
        if isinstance(made, execution_pb2.RetryRunRequest):
            made.run_id = self.start(agent=FAILING_AGENT, wait=timedelta(seconds=CALL_SECONDS))
        if isinstance(made, execution_pb2.ResumeRunRequest):
            self._say("PauseRun", execution_pb2.PauseRunRequest(run_id=made.run_id))
        if isinstance(made, registry_pb2.GetTenantRequest | registry_pb2.DeleteTenantRequest):
            self._say("PutTenant", registry_pb2.PutTenantRequest())
        if "Schedule" in rpc.name and rpc.name != "PutSchedule":
            self._say("PutSchedule", self._requests()["PutSchedule"])
        if isinstance(made, state_pb2.GetApprovalRequest | execution_pb2.ResolveApprovalRequest):
            made.approval_id = self.ask()
        if isinstance(made, state_pb2.ListApprovalsRequest):
            self.ask()
        return made

    def ask(self) -> str:
        """Starts a run that asks for leave, and gives the approval's id once it is open."""
        question = state_pb2.ListApprovalsRequest(run_id=self.start(agent=ASKING_AGENT))
        opened = wait_until_blocking(lambda: self._say("ListApprovals", question).approvals, what="the approval")
        approval_id: str = opened[0].approval_id
        return approval_id

    def _say(self, name: str, request: Message) -> Any:  # Any: answers have no common base
        rpc = rpc_named(name)
        return self.wire.answer(rpc, request, self.metadata(rpc))

    def start(self, **fields: Any) -> str:
        """Starts a run that takes its time, and gives its id; `fields` (Any) are StartRunRequest's."""
        run_id: str = self._say("StartRun", execution_pb2.StartRunRequest(**{"agent": SLOW_AGENT, **fields})).run_id
        return run_id

    def _requests(self) -> Mapping[str, Message]:
        context = self.user.to_message()
        context.run_id = new_id()
        start = execution_pb2.StartRunRequest(agent=self.agent, input=b'{"value": 1}')
        tool_call = dispatcher_pb2.ToolCall(
            item_id=1, context=context, call_id=new_id(), tool="diagnostics.echo", arguments=b"{}", attempt=1
        )
        tool_call.effect = types_pb2.EFFECT_CLASS_PURE
        tool = types_pb2.Tool(name="matrix.tool", input_schema=b'{"type": "object"}', effect=tool_call.effect)
        hello = dispatcher_pb2.AttachHello(worker_id=new_id(), tools=[tool], concurrency=1)
        schedule = {"apiVersion": "mainspring/v1", "kind": "Schedule", "name": SCHEDULE, "cron": "0 0 1 1 *"}
        return {
            "RegisterAgent": registry_pb2.RegisterAgentRequest(document=orjson.dumps(echo_agent(self.agent))),
            "GetAgent": registry_pb2.GetAgentRequest(name=self.agent),
            "ListAgents": registry_pb2.ListAgentsRequest(),
            "ListVersions": registry_pb2.ListVersionsRequest(name=self.agent),
            "ResolveAgent": registry_pb2.ResolveAgentRequest(name=self.agent),
            "RegisterTools": registry_pb2.RegisterToolsRequest(tools=[tool]),
            "ListTools": registry_pb2.ListToolsRequest(),
            "PutTenant": registry_pb2.PutTenantRequest(limits=registry_pb2.TenantLimits(max_concurrent=1_000)),
            "GetTenant": registry_pb2.GetTenantRequest(),
            "ListTenants": registry_pb2.ListTenantsRequest(),
            "DeleteTenant": registry_pb2.DeleteTenantRequest(),
            "PutSchedule": registry_pb2.PutScheduleRequest(document=orjson.dumps(schedule | {"agent": self.agent})),
            "GetSchedule": registry_pb2.GetScheduleRequest(name=SCHEDULE),
            "ListSchedules": registry_pb2.ListSchedulesRequest(),
            "DeleteSchedule": registry_pb2.DeleteScheduleRequest(name=SCHEDULE),
            "WatchCatalog": registry_pb2.WatchCatalogRequest(),
            "CallTools": dispatcher_pb2.CallToolsRequest(calls=[tool_call]),
            "CancelCalls": dispatcher_pb2.CancelCallsRequest(tenant_id=self.user.tenant_id, call_ids=["none"]),
            "Attach": dispatcher_pb2.AttachRequest(hello=hello),
            "StartRun": start,
            "StartRuns": execution_pb2.StartRunsRequest(
                starts=[execution_pb2.StartItem(item_id=1, context=context, start=start)]
            ),
            "CancelRun": execution_pb2.CancelRunRequest(),
            "PauseRun": execution_pb2.PauseRunRequest(),
            "ResumeRun": execution_pb2.ResumeRunRequest(),
            "SignalRun": execution_pb2.SignalRunRequest(name="go"),
            "RetryRun": execution_pb2.RetryRunRequest(),
            "ForkRun": execution_pb2.ForkRunRequest(run_id=self.run_id, seq=1),
            "ResolveApproval": execution_pb2.ResolveApprovalRequest(decision=types_pb2.APPROVAL_DECISION_ALLOW),
            "ExplainRun": execution_pb2.ExplainRunRequest(run_id=self.run_id),
            "Append": state_pb2.AppendRequest(),
            "PutInput": state_pb2.PutInputRequest(cancel=state_pb2.CancelInput()),
            "ClaimRuns": state_pb2.ClaimRunsRequest(executor_id=unique("matrix"), credit=1),
            "Heartbeat": state_pb2.HeartbeatRequest(executor_id=unique("matrix"), beat=1, leaving=True),
            "PublishDeltas": state_pb2.PublishDeltasRequest(),
            "Follow": state_pb2.FollowRequest(),
            "GetRun": state_pb2.GetRunRequest(run_id=self.run_id),
            "ListRuns": state_pb2.ListRunsRequest(),
            "WaitRun": state_pb2.WaitRunRequest(run_id=self.run_id),
            "ReadEvents": state_pb2.ReadEventsRequest(run_id=self.run_id),
            "CreateSession": state_pb2.CreateSessionRequest(session_id=unique("session")),
            "GetSession": state_pb2.GetSessionRequest(session_id=self.user.session_id),
            "ListSessions": state_pb2.ListSessionsRequest(),
            "GetApproval": state_pb2.GetApprovalRequest(),
            "ListApprovals": state_pb2.ListApprovalsRequest(),
            "ListRunMetrics": state_pb2.ListRunMetricsRequest(),
        }


def rpc_named(name: str) -> Rpc:
    """The built rpc of this name; names are unique over the services."""
    (found,) = [rpc for rpc in BUILT if rpc.name == name]
    return found


def too_low_a_role(rpc: Rpc) -> str:
    """The highest role that the rpc refuses, or nothing."""
    if rpc.role == "service":
        return ROLE_NAMES[-1]
    index = ROLE_NAMES.index(rpc.role)
    return ROLE_NAMES[index - 1] if index else ""
