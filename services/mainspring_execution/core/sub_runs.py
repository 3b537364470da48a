"""Other agents in a run: sub-runs, how their ends become outcomes of calls, and to whom a run is handed over."""

from __future__ import annotations

from typing import Final

import orjson
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.intrinsic import AGENT_PREFIX, HANDOFF_PREFIX
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.progress import Progress
from mainspring_execution.core.record import Envelope, error_value
from mainspring_execution.core.waits import OK, Ended, close, read_arguments

DEPTH_MAX: Final = 10
REASON_CHARACTERS_MAX: Final = 1_000

_STATUSES: Final = {
    types_pb2.RUN_STATE_CANCELLED: types_pb2.TOOL_STATUS_CANCELLED,
    types_pb2.RUN_STATE_TIMED_OUT: types_pb2.TOOL_STATUS_TIMED_OUT,
}


def check_depth(call: events_pb2.PlannedCall, run: types_pb2.Run) -> MainspringError | None:
    """DEPTH_EXCEEDED for a call of an agent by a run that is as deep as one may be."""
    if not call.tool.startswith(AGENT_PREFIX) or run.depth < DEPTH_MAX:
        return None
    agent = call.tool.removeprefix(AGENT_PREFIX)
    return MainspringError(
        Reason.DEPTH_EXCEEDED,
        f"A sub-run of agent {agent} would be {run.depth + 1} deep, at most {DEPTH_MAX} are allowed: do it here, or "
        "let the agents call each other less deep.",
        agent=agent,
        depth=run.depth + 1,
    )


def make_sub_run(
    parent: types_pb2.Run,
    intent: events_pb2.ToolExecuting,
    *,
    plan: AgentPlan,
    session_id: str,
    user_id: str,
    trace_id: str,
    executor_id: str,
    now: float,
) -> tuple[state_pb2.CreateRun, events_pb2.RunEvent, types_pb2.Run]:
    """The create of the sub-run that an intent names, its agent_started, and the run as its executor knows it.

    `now`: in seconds since 1970. It has no more time than its parent.
    """
    root_run_id = parent.root_run_id or parent.run_id
    run = types_pb2.Run(
        run_id=intent.sub_run_id,
        agent=plan.agent,
        agent_version=plan.version,
        epoch=1,
        parent_run_id=parent.run_id,
        root_run_id=root_run_id,
        depth=parent.depth + 1,
        attempt=1,
    )
    run.create_time.FromMicroseconds(int(now * 1e6))
    run.deadline.FromMicroseconds(int((now + plan.timeout_seconds) * 1e6))
    if parent.HasField("deadline") and parent.deadline.ToNanoseconds() < run.deadline.ToNanoseconds():
        run.deadline.CopyFrom(parent.deadline)
    create = state_pb2.CreateRun(
        user_id=user_id,
        session_id=session_id,
        agent=plan.agent,
        agent_version=plan.version,
        input=intent.arguments or b"{}",
        executor_id=executor_id,
        deadline=run.deadline,
        trace_id=trace_id,
        parent_run_id=parent.run_id,
        root_run_id=root_run_id,
        parent_call_id=intent.call_id,
        depth=run.depth,
    )
    envelope = Envelope(run.run_id, session_id, plan.agent, trace_id, parent.run_id, root_run_id)
    started = events_pb2.AgentStarted(agent_version=plan.version, input=create.input, attempt=1)
    return create, envelope.event(1, agent_started=started), run


def settle_sub_run(
    progress: Progress, intent: events_pb2.ToolExecuting, *, run: types_pb2.Run, now: float
) -> events_pb2.ToolCompleted:
    """The outcome of a call whose sub-run has ended as `run` says."""
    if run.state == types_pb2.RUN_STATE_COMPLETED:
        return close(progress, intent, ended=Ended(OK, orjson.Fragment(run.result or b"null")), now=now)
    agent = intent.tool.removeprefix(AGENT_PREFIX)
    if run.state == types_pb2.RUN_STATE_CANCELLED:
        code, reason, why = "CANCELLED", "RUN_CANCELLED", "it was cancelled"
    else:
        code, reason, why = run.error.code, run.error.reason, run.error.message
    failed = MainspringError(
        Reason.SUB_RUN_FAILED,
        f"The sub-run {run.run_id} of agent {agent} did not complete: {why}",
        agent=agent,
        sub_run_id=run.run_id,
        sub_reason=reason,
    )
    error = error_value(failed)
    error.code = code or error.code
    status = _STATUSES.get(run.state, types_pb2.TOOL_STATUS_ERROR)
    return close(progress, intent, ended=Ended(status, error=error), now=now)


def refuse_sub_run(
    progress: Progress, intent: events_pb2.ToolExecuting, *, error: MainspringError, now: float
) -> events_pb2.ToolCompleted:
    """The outcome of a call whose sub-run could not be made."""
    return close(progress, intent, ended=Ended(types_pb2.TOOL_STATUS_ERROR, error=error_value(error)), now=now)


def find_failure(plan: AgentPlan, progress: Progress) -> types_pb2.RunError | None:
    """The error of a sub-run of the last step whose failure ends the run."""
    # The last step may be that of an agent which has handed the run over.
    is_own = progress.steps >= progress.agent_first_step
    for call in progress.thoughts[-1].planned_calls if is_own else ():
        outcome = progress.outcomes.get(call.call_id)
        if call.tool in plan.fail_fast and outcome is not None and outcome.status != OK:
            return outcome.error
    return None


def handed_over_already(progress: Progress, call: events_pb2.PlannedCall) -> events_pb2.ToolCompleted | None:
    """The outcome of a handoff of a step that has handed the run over to another agent."""
    if not progress.agent or progress.agent_first_step <= progress.steps:
        return None
    error = types_pb2.RunError(
        code="FAILED_PRECONDITION",
        reason="HANDED_OFF",
        message=f"Agent {progress.agent} goes on, the first that the step named: a run is handed over to one agent.",
        metadata={"tool": call.tool, "agent": progress.agent},
    )
    return events_pb2.ToolCompleted(
        call_id=call.call_id, tool=call.tool, status=types_pb2.TOOL_STATUS_ERROR, error=error, attempts=1
    )


def hand_over(
    call: events_pb2.PlannedCall, *, from_agent: str, to: AgentPlan
) -> tuple[events_pb2.ToolCompleted, events_pb2.AgentHandedOff]:
    """The outcome of a handoff and what happens with it; both are recorded in one append. TOOL_ARGUMENTS_INVALID."""
    reason = read_arguments(call).get("reason")
    outcome = events_pb2.ToolCompleted(
        call_id=call.call_id,
        tool=call.tool,
        status=OK,
        result=orjson.dumps({"agent": to.agent, "version": to.version}),
        attempts=1,
    )
    handed_off = events_pb2.AgentHandedOff(
        from_agent=from_agent,
        to_agent=to.agent,
        to_version=to.version,
        reason=reason[:REASON_CHARACTERS_MAX] if isinstance(reason, str) else "",
    )
    return outcome, handed_off


def handoff_agent(call: events_pb2.PlannedCall) -> str:
    """To whom a call hands the run over."""
    return call.tool.removeprefix(HANDOFF_PREFIX)
