"""What is asked of runs, and events of runs that wait, are paused or ask people, for the contract tests of state."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import from_rpc_error
from mainspring_kit.identity import UserExecutionContext, new_id

from test_framework.identities import Identities
from tests.contract.state_calls import TIMEOUT, Executor, reason_of

# Any in this module: generated stubs have no common base, and fields are those of the messages.

ALLOW = types_pb2.APPROVAL_DECISION_ALLOW
DENY = types_pb2.APPROVAL_DECISION_DENY
EXPIRED = types_pb2.APPROVAL_DECISION_EXPIRED
WITHDRAWN = types_pb2.APPROVAL_DECISION_WITHDRAWN
WAITING = types_pb2.RUN_STATE_WAITING
PAUSED = types_pb2.RUN_STATE_PAUSED
RUNNING = types_pb2.RUN_STATE_RUNNING

RELEASE = state_pb2.Release()


def moment(seconds: float) -> Timestamp:
    """So many seconds from now."""
    timestamp = Timestamp()
    timestamp.FromDatetime(datetime.now(UTC) + timedelta(seconds=seconds))
    return timestamp


def due_in(seconds: float) -> state_pb2.Release:
    """Lets a run go until then."""
    return state_pb2.Release(due_time=moment(seconds))


def waiting(**fields: Any) -> events_pb2.RunEvent:
    """The run can do nothing now."""
    return events_pb2.RunEvent(agent_waiting=events_pb2.AgentWaiting(**fields))


def paused() -> events_pb2.RunEvent:
    """The run stands still."""
    return events_pb2.RunEvent(agent_paused=events_pb2.AgentPaused(requested_by="ann"))


def resumed() -> events_pb2.RunEvent:
    """The run goes on."""
    return events_pb2.RunEvent(agent_resumed=events_pb2.AgentResumed(requested_by="ann"))


def signalled(name: str = "go") -> events_pb2.RunEvent:
    """A signal was taken."""
    return events_pb2.RunEvent(signal_received=events_pb2.SignalReceived(name=name))


def asking(run_id: str, seq: int, **fields: Any) -> events_pb2.RunEvent:
    """A person is asked, in the event of this seq."""
    made: dict[str, Any] = {"title": "May I?", "call_id": f"{run_id}.2.0", "kind": types_pb2.APPROVAL_KIND_QUESTION}
    request = events_pb2.ApprovalRequested(approval_id=f"{run_id}.{seq}", **(made | fields))
    return events_pb2.RunEvent(approval_requested=request)


def resolved(run_id: str, seq: int, decision: types_pb2.ApprovalDecision.ValueType = ALLOW) -> events_pb2.RunEvent:
    """The approval that was asked for in the event of this seq is over."""
    over = events_pb2.ApprovalResolved(approval_id=f"{run_id}.{seq}", decision=decision, by="ann")
    return events_pb2.RunEvent(approval_resolved=over)


class Asker:
    """Somebody who asks something of runs, on the module's state service."""

    def __init__(self, stub: Any, identities: Identities, user: UserExecutionContext, *, role: str = "runner") -> None:
        self.user = user
        self._stub = stub
        self.metadata = identities.metadata(user.tenant_id, user.user_id, role)

    async def put(self, run_id: str, *, request_id: str = "", metadata: Any = None, **asked: Any) -> state_pb2.RunInput:
        """Asks it; gives the input as stored."""
        request = state_pb2.PutInputRequest(run_id=run_id, request_id=request_id or new_id(), **asked)
        answer = await self._stub.PutInput(request, metadata=metadata or self.metadata, timeout=TIMEOUT)
        stored: state_pb2.RunInput = answer.input
        return stored

    async def try_put(self, run_id: str, **asked: Any) -> str:
        """Asks it; gives the reason of the refusal, or nothing."""
        try:
            await self.put(run_id, **asked)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error).reason_name
        return ""

    async def signal(self, run_id: str, name: str = "go", **fields: Any) -> str:
        """Sends a signal; gives the reason of the refusal, or nothing."""
        return await self.try_put(run_id, signal=state_pb2.SignalInput(name=name), **fields)

    async def pause(self, run_id: str) -> str:
        """Pauses; gives the reason of the refusal, or nothing."""
        return await self.try_put(run_id, pause=state_pb2.PauseInput(reason="lunch"))

    async def resume(self, run_id: str) -> str:
        """Resumes; gives the reason of the refusal, or nothing."""
        return await self.try_put(run_id, resume=state_pb2.ResumeInput())

    async def cancel(self, run_id: str) -> str:
        """Cancels; gives the reason of the refusal, or nothing."""
        return await self.try_put(run_id, cancel=state_pb2.CancelInput())

    async def answer(
        self, approval_id: str, decision: types_pb2.ApprovalDecision.ValueType = ALLOW, data: bytes = b"", **fields: Any
    ) -> str:
        """Answers an approval; gives the reason of the refusal, or nothing."""
        approval = state_pb2.ApprovalInput(approval_id=approval_id, decision=decision, data=data)
        return await self.try_put(approval_id.partition(".")[0], approval=approval, **fields)

    async def run(self, run_id: str, *, explain: bool = False) -> state_pb2.GetRunResponse:
        """Reads a run."""
        request = state_pb2.GetRunRequest(run_id=run_id, explain=explain)
        response: state_pb2.GetRunResponse = await self._stub.GetRun(request, metadata=self.metadata, timeout=TIMEOUT)
        return response

    async def approvals(self, **fields: Any) -> list[types_pb2.Approval]:
        """Reads a page of approvals."""
        request = state_pb2.ListApprovalsRequest(**fields)
        response = await self._stub.ListApprovals(request, metadata=self.metadata, timeout=TIMEOUT)
        return list(response.approvals)

    async def approval(self, approval_id: str) -> types_pb2.Approval | None:
        """Reads an approval; None: there is none that this one may see."""
        request = state_pb2.GetApprovalRequest(approval_id=approval_id)
        try:
            response = await self._stub.GetApproval(request, metadata=self.metadata, timeout=TIMEOUT)
        except grpc.aio.AioRpcError as error:
            assert from_rpc_error(error).reason_name == "APPROVAL_NOT_FOUND"
            return None
        approval: types_pb2.Approval = response.approval
        return approval


async def park(executor: Executor, user: UserExecutionContext, **release: Any) -> str:
    """A run that waits and is let go; its log ends with agent_waiting as #2."""
    run_id = await executor.start(user)
    release = {"release": RELEASE} | release
    await executor.go_on(user, run_id, waiting(), after=1, **release)
    return run_id


async def ask_person(executor: Executor, user: UserExecutionContext, **fields: Any) -> str:
    """A run that has asked a person, in #2, and waits; gives the approval's id."""
    run_id = await executor.start(user)
    await executor.go_on(user, run_id, asking(run_id, 2, **fields), waiting(), after=1, release=RELEASE)
    return f"{run_id}.2"


async def fork_sub_run(executor: Executor, user: UserExecutionContext, parent: str, **fields: Any) -> str:
    """A sub-run of a run, under way; gives its id."""
    create = executor.create(
        user, parent_run_id=parent, root_run_id=parent, parent_call_id=f"{parent}.2.0", depth=1, **fields
    )
    result = await executor.send_one(create)
    assert (reason_of(result.status), result.state, result.ordinal) == ("", RUNNING, 0)
    return result.run_id
