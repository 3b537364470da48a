"""How a run waits and is controlled: inputs become events, calls wait, and the run is given back meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import UserExecutionContext, new_id

from mainspring_execution.core.decision import Park, refuse_call
from mainspring_execution.core.intrinsic import AGENT_PREFIX
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.policy import PAUSE_SECONDS_MAX
from mainspring_execution.core.record import error_value
from mainspring_execution.core.sub_runs import check_depth
from mainspring_execution.core.waits import make_intent, open_wait
from mainspring_execution.engine.attention import Attention
from mainspring_execution.engine.deadlines import Deadlines
from mainspring_execution.engine.journal import Journal, ask
from mainspring_execution.engine.surroundings import Grip, Surroundings

EXPIRY_SECONDS: Final = 1.0
# The clock of the day and that of timers are two: what the one takes for over may be yet to come for the other.
SECONDS_MIN: Final = 0.001
# Past also for a database whose clock is behind.
LONG_AGO: Final = 1.0


class Waiting:
    """The waits of one run. `pause_input`: somebody wants it to stand still once nothing is under way.

    `ended_sub_runs`: what is told of their ends and not recorded yet.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        context: UserExecutionContext,
        *,
        run: types_pb2.Run,
        attention: Attention,
        journal: Journal,
        grip: Grip,
        deadlines: Deadlines,
    ) -> None:
        self.pause_input: state_pb2.RunInput | None = None
        self.ended_sub_runs: list[state_pb2.RunInput] = []
        self._kept: list[state_pb2.RunInput] = []
        self._around = surroundings
        self._context = context
        self._run = run
        self._attention = attention
        self._journal = journal
        self._grip = grip
        self._deadlines = deadlines

    def take_inputs(self) -> None:
        """Records what was asked, in the order of its coming; a paused run takes nothing before it is resumed."""
        # Each is told by another way, and one may overtake the other.
        inputs = sorted([*self._kept, *self._attention.inputs], key=lambda request: request.create_time.ToNanoseconds())
        self._kept, self._attention.inputs = [], []
        if self._journal.progress.paused:
            resume = next((request for request in inputs if request.HasField("resume")), None)
            if resume is None:
                self._kept = inputs
                return
            # It ends the pauses before it, also one that a later pause has overtaken.
            over = [request for request in inputs[: inputs.index(resume)] if request.HasField("pause")]
            for request in over:
                self._journal.consume(request.request_id)
            inputs = [resume, *(request for request in inputs if request is not resume and request not in over)]
        for request in inputs:
            self._take(request)

    def pause(self) -> None:
        """Stands still, and gives the run back, as was asked."""
        self._record_pause()
        self._journal.release(None)

    def open(self, plan: AgentPlan, calls: Sequence[events_pb2.PlannedCall]) -> None:
        """Records that these calls wait, or what is wrong with them."""
        for call in calls:
            refusal = refuse_call(plan, call) or check_depth(call, self._run)
            try:
                if refusal is not None:
                    raise refusal
                intent, question = open_wait(call, now=time.time())
            except MainspringError as error:
                self._journal.record(tool_executing=make_intent(call))
                self._journal.record(
                    tool_completed=events_pb2.ToolCompleted(
                        call_id=call.call_id,
                        tool=call.tool,
                        status=types_pb2.TOOL_STATUS_ERROR,
                        error=error_value(error),
                    )
                )
                continue
            if call.tool.startswith(AGENT_PREFIX):
                intent.sub_run_id = new_id()
            self._journal.record(tool_executing=intent, event_time=_now())
            if question is not None:
                ask(self._journal, question)

    async def expire(self, approval_id: str) -> None:
        """Says that nobody answered in time; whoever did so in this very moment was first, and is heard of soon."""
        try:
            stored = await self._grip.reach(lambda: self._put_expiry(approval_id))
        except MainspringError as error:
            if error.code is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            if not self._attention.inputs:
                await self._attention.pause(EXPIRY_SECONDS)
            return
        if stored is not None:
            self._attention.hear(stored)

    async def park(self, park: Park) -> None:
        """Waits here for what is soon, else gives the run back until then."""
        now = time.time()
        # A claim comes early where this clock is behind the database's: then the rest is waited for here.
        until = min(self._deadlines.run, math.inf if park.until is None else park.until)
        if until - now <= PAUSE_SECONDS_MAX and not self._attention.is_leaving:
            self._journal.flush()
            if not self._attention.inputs:
                await self._attention.pause(max(SECONDS_MIN, until - now))
            return
        progress = self._journal.progress
        if not progress.paused and progress.last_event != "agent_waiting":
            waiting = events_pb2.AgentWaiting(wait_for=park.kind, detail=park.detail, call_ids=park.call_ids)
            if park.until is not None:
                waiting.until.FromMicroseconds(int(park.until * 1e6))
            self._journal.record(agent_waiting=waiting)
        self._journal.release(park.until)

    def hand_back(self) -> None:
        """Gives the run to whoever takes it up at once."""
        self._journal.release(LONG_AGO)

    def _take(self, request: state_pb2.RunInput) -> None:
        progress, journal = self._journal.progress, self._journal
        kind = "" if request.request_id in progress.requests else request.WhichOneof("input")
        if kind == "pause":
            self.pause_input = request
            return
        if kind == "sub_run_ended":
            self.ended_sub_runs.append(request)
            return
        if kind == "resume":
            if not self._resume(request):
                self._kept.append(request)
                return
        elif kind == "signal":
            journal.record(
                signal_received=events_pb2.SignalReceived(
                    name=request.signal.name,
                    data=request.signal.data,
                    by=request.requested_by,
                    request_id=request.request_id,
                )
            )
        elif kind == "approval":
            answer = request.approval
            if any(asked.approval_id == answer.approval_id for asked in progress.approvals.values()):
                expired = answer.decision == types_pb2.APPROVAL_DECISION_EXPIRED
                journal.record(
                    approval_resolved=events_pb2.ApprovalResolved(
                        approval_id=answer.approval_id,
                        decision=answer.decision,
                        data=answer.data,
                        by="" if expired else request.requested_by,
                    )
                )
        journal.consume(request.request_id)

    def _resume(self, request: state_pb2.RunInput) -> bool:
        """Goes on; False: the pause that it ends, which was there before it, is still on its way here."""
        if self.pause_input is not None:
            # Taken back before it took effect. The log names both, or one that is told late would be taken for new.
            self._record_pause()
        if not self._journal.progress.paused:
            return False
        resumed = events_pb2.AgentResumed(requested_by=request.requested_by, request_id=request.request_id)
        self._journal.record(agent_resumed=resumed)
        return True

    def _record_pause(self) -> None:
        asked, self.pause_input = self.pause_input, None
        assert asked is not None, "somebody asked for it"
        self._journal.record(
            agent_paused=events_pb2.AgentPaused(
                requested_by=asked.requested_by, reason=asked.pause.reason, request_id=asked.request_id
            )
        )
        self._journal.consume(asked.request_id)

    async def _put_expiry(self, approval_id: str) -> state_pb2.RunInput:
        return await self._around.state.put_input(
            self._context,
            state_pb2.PutInputRequest(
                run_id=self._journal.envelope.run_id,
                request_id=f"{approval_id}.expired",
                approval=state_pb2.ApprovalInput(approval_id=approval_id, decision=types_pb2.APPROVAL_DECISION_EXPIRED),
            ),
        )


def _now() -> Timestamp:
    """Until state says when the event became durable: the same for what is counted from it."""
    moment = Timestamp()
    moment.FromMicroseconds(int(time.time() * 1e6))
    return moment
