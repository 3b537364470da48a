"""Who may do what at the gateway: the bearer's identity, the least role of the rpc behind a request, page origins."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final
from urllib.parse import urlsplit

from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from mainspring.v1 import execution_pb2, identity_pb2, registry_pb2, state_pb2
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import Principal, TokenVerifier, UserExecutionContext, new_id
from mainspring_kit.interceptors import bearer_token


def _method(contract: FileDescriptor, service: str, *, name: str) -> MethodDescriptor:
    return contract.services_by_name[service].methods_by_name[name]


# The rpc behind each thing a client may do; its role is the one the contract gives it.
START_RUN: Final = _method(execution_pb2.DESCRIPTOR, "ExecutionService", name="StartRun")
CANCEL_RUN: Final = _method(execution_pb2.DESCRIPTOR, "ExecutionService", name="CancelRun")
PAUSE_RUN: Final = _method(execution_pb2.DESCRIPTOR, "ExecutionService", name="PauseRun")
RESUME_RUN: Final = _method(execution_pb2.DESCRIPTOR, "ExecutionService", name="ResumeRun")
RETRY_RUN: Final = _method(execution_pb2.DESCRIPTOR, "ExecutionService", name="RetryRun")
FORK_RUN: Final = _method(execution_pb2.DESCRIPTOR, "ExecutionService", name="ForkRun")
SIGNAL_RUN: Final = _method(execution_pb2.DESCRIPTOR, "ExecutionService", name="SignalRun")
EXPLAIN_RUN: Final = _method(execution_pb2.DESCRIPTOR, "ExecutionService", name="ExplainRun")
RESOLVE_APPROVAL: Final = _method(execution_pb2.DESCRIPTOR, "ExecutionService", name="ResolveApproval")
GET_APPROVAL: Final = _method(state_pb2.DESCRIPTOR, "StateService", name="GetApproval")
LIST_APPROVALS: Final = _method(state_pb2.DESCRIPTOR, "StateService", name="ListApprovals")
LIST_RUN_METRICS: Final = _method(state_pb2.DESCRIPTOR, "StateService", name="ListRunMetrics")
FOLLOW: Final = _method(state_pb2.DESCRIPTOR, "StateService", name="Follow")
GET_RUN: Final = _method(state_pb2.DESCRIPTOR, "StateService", name="GetRun")
LIST_RUNS: Final = _method(state_pb2.DESCRIPTOR, "StateService", name="ListRuns")
READ_EVENTS: Final = _method(state_pb2.DESCRIPTOR, "StateService", name="ReadEvents")
LIST_SESSIONS: Final = _method(state_pb2.DESCRIPTOR, "StateService", name="ListSessions")
REGISTER_AGENT: Final = _method(registry_pb2.DESCRIPTOR, "RegistryService", name="RegisterAgent")
GET_AGENT: Final = _method(registry_pb2.DESCRIPTOR, "RegistryService", name="GetAgent")
LIST_AGENTS: Final = _method(registry_pb2.DESCRIPTOR, "RegistryService", name="ListAgents")
PUT_SCHEDULE: Final = _method(registry_pb2.DESCRIPTOR, "RegistryService", name="PutSchedule")
GET_SCHEDULE: Final = _method(registry_pb2.DESCRIPTOR, "RegistryService", name="GetSchedule")
LIST_SCHEDULES: Final = _method(registry_pb2.DESCRIPTOR, "RegistryService", name="ListSchedules")
DELETE_SCHEDULE: Final = _method(registry_pb2.DESCRIPTOR, "RegistryService", name="DeleteSchedule")
LIST_TOOLS: Final = _method(registry_pb2.DESCRIPTOR, "RegistryService", name="ListTools")
LIST_INSTANCES: Final = _method(registry_pb2.DESCRIPTOR, "RegistryService", name="ListInstances")


def verify_user(verifier: TokenVerifier, token: str) -> Principal:
    """The user whose token it is. A service's token is refused: services speak gRPC, and name their users."""
    principal = verifier.verify(token)
    if principal.is_service:
        detail = "it is a service's, and the gateway is for users"
        raise MainspringError(
            Reason.TOKEN_INVALID, f"The bearer token is not valid here: {detail}. Get a user's token.", detail=detail
        )
    return principal


def authenticate(verifier: TokenVerifier, headers: Mapping[str, str]) -> Principal:
    """The user of the `Authorization` header; TOKEN_MISSING or TOKEN_INVALID."""
    return verify_user(verifier, bearer_token({"authorization": headers.get("Authorization", "")}))


def authorize(principal: Principal, method: MethodDescriptor) -> None:
    """Checks the role that the contract asks of the method; ROLE_REQUIRED."""
    role = _role(method)
    if not principal.covers(role):
        name = identity_pb2.Role.Name(role).removeprefix("ROLE_").lower()
        raise MainspringError(
            Reason.ROLE_REQUIRED,
            f"{method.name} needs the role {name}; the token has {', '.join(principal.roles)}: get one with that role.",
            method=method.full_name,
            role=name,
        )


@cache
def _role(method: MethodDescriptor) -> identity_pb2.Role.ValueType:
    return method.GetOptions().Extensions[identity_pb2.role]


def context_of(
    principal: Principal, *, request_id: str = "", session_id: str = "", run_id: str = "", trace_id: str = ""
) -> UserExecutionContext:
    """The context of one request of the user's. Identities come from the credential, never from what was sent."""
    return UserExecutionContext(
        tenant_id=principal.tenant_id,
        user_id=principal.user_id,
        session_id=session_id,
        run_id=run_id,
        request_id=request_id or new_id(),
        roles=principal.roles,
        trace_id=trace_id or new_id().replace("-", ""),
    )


def check_origin(origin: str | None, *, host: str, allowed: frozenset[str]) -> None:
    """Lets through what no browser sent, the gateway's own pages and the allowed ones; ORIGIN_REFUSED otherwise."""
    if origin is None or "*" in allowed or origin.lower() in allowed:
        return
    if host and _host_of(origin) == host.lower():
        return
    raise MainspringError(
        Reason.ORIGIN_REFUSED,
        f"Pages of {origin[:128]} may not open sockets here: add the origin to MAINSPRING_ALLOWED_ORIGINS.",
        origin=origin[:128],
    )


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""  # a bracket that is not closed
