"""The log of one run as its holder writes it: events numbered, folded and appended in order, and what state says."""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from dataclasses import replace
from typing import Final

from google.rpc import code_pb2
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import MainspringError, from_status, to_status
from mainspring_kit.identity import new_id

from mainspring_execution.core.progress import Progress
from mainspring_execution.core.record import Envelope
from mainspring_execution.engine.attention import Attention
from mainspring_execution.peers import UNREACHED, AppendPool

EVENTS_PER_APPEND_MAX: Final = 64
# Under the largest message that a stream takes, with an event of 16 MiB beside it.
PENDING_BYTES_MAX: Final = 2 << 20
# A run that thinks faster than the database writes would fill the memory of both ends.
UNANSWERED_APPENDS_MAX: Final = 8
RETRY_SECONDS: Final = 0.25

_Sent = tuple[state_pb2.Append, asyncio.Future[state_pb2.AppendResult]]


class Journal:
    """Events go `record` -> pending -> `flush` -> unanswered -> durable. `trouble`: why an append was refused."""

    def __init__(
        self,
        appends: AppendPool,
        envelope: Envelope,
        *,
        tenant_id: str,
        epoch: int,
        state_id: str,
        attention: Attention,
    ) -> None:
        self.progress = Progress()
        self.envelope = envelope
        self._first_agent = envelope.agent
        self.epoch = epoch
        self.trouble: MainspringError | None = None
        # The run was given back, as far as this process can tell: nothing more may be written.
        self.is_released = False
        self._appends = appends
        self._tenant_id = tenant_id
        self._state_id = state_id
        self._attention = attention
        self._pending: list[events_pb2.RunEvent] = []
        self._pending_bytes = 0
        self._consumed: list[str] = []
        self._unanswered: deque[_Sent] = deque()
        self._retry: asyncio.TimerHandle | None = None

    @property
    def state_id(self) -> str:
        """Where the appends go."""
        return self._state_id

    @property
    def is_settled(self) -> bool:
        """Whether every append was answered."""
        return not self._unanswered

    @property
    def is_behind(self) -> bool:
        """Whether so much awaits its answer that nothing more should be begun."""
        return len(self._unanswered) >= UNANSWERED_APPENDS_MAX

    def record(self, **payload: object) -> events_pb2.RunEvent:
        """Writes down what happened next; it is sent with the next flush."""
        event = self.envelope.event(self.progress.seq + 1, **payload)
        size_bytes = event.ByteSize()
        if len(self._pending) >= EVENTS_PER_APPEND_MAX or self._pending_bytes + size_bytes > PENDING_BYTES_MAX:
            self.flush()
        self.progress.apply(event)
        if "agent_handed_off" in payload:
            self._name_agent()
        self._pending.append(event)
        self._pending_bytes += size_bytes
        return event

    def consume(self, request_id: str) -> None:
        """An input is done with: what was just recorded says so, or there is nothing to say."""
        self._consumed.append(request_id)

    def release(self, due_time: float | None) -> None:
        """Gives the run back with what is pending; somebody takes it up at `due_time`, in seconds since 1970.

        None: only for an input or the deadline.
        """
        self.is_released = True
        release = state_pb2.Release()
        if due_time is not None:
            release.due_time.FromMicroseconds(math.ceil(due_time * 1e6))
        self.flush(release)

    def flush(self, release: state_pb2.Release | None = None, *, metrics: types_pb2.RunMetrics | None = None) -> bool:
        """Sends what is pending, if anything, as one append. Nobody here awaits the answer: `is_settled`, `trouble`."""
        if not self._pending and not self._consumed and release is None:
            return False
        append_id = new_id()
        for event in self._pending:
            event.append_id = append_id
        append = state_pb2.Append(
            append_id=append_id,
            tenant_id=self._tenant_id,
            run_id=self.envelope.run_id,
            expected_seq=self.progress.seq - len(self._pending),
            epoch=self.epoch,
            events=self._pending,
            consumed_request_ids=self._consumed,
            release=release,
            metrics=metrics,
        )
        self._pending = []
        if self._consumed:
            self._consumed = []
        self._pending_bytes = 0
        self._post(append)
        return True

    def restore(self, progress: Progress) -> None:
        """Goes on from what is durable; what is pending or was refused is forgotten."""
        self.progress = progress
        self._name_agent()
        self.trouble = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._pending.clear()
        self._pending_bytes = 0
        self._consumed.clear()
        self._unanswered.clear()
        self.is_released = False

    async def wait_answered(self) -> None:
        """Until every append has an answer, refusals included; state answers each, and the streams see to that."""
        for _, future in list(self._unanswered):
            await asyncio.shield(future)

    def _name_agent(self) -> None:
        """Events are of the agent that drives the run now."""
        self.envelope = replace(self.envelope, agent=self.progress.agent or self._first_agent)

    def _post(self, append: state_pb2.Append) -> None:
        if self.is_settled:
            # All appends of a run go one way; it may change only while none is unanswered.
            self._state_id = self._appends.pick_instance(self._state_id) or self._state_id
        try:
            last = self._unanswered[-1][0] if self._unanswered else None
            future = self._appends.post(append, instance_id=self._state_id, after=last)
        except MainspringError as error:
            # The queue to state is full: as if state had said so.
            future = asyncio.get_running_loop().create_future()
            future.set_result(state_pb2.AppendResult(status=to_status(error)))
        self._unanswered.append((append, future))
        future.add_done_callback(self._take_answer)

    def _take_answer(self, _: asyncio.Future[state_pb2.AppendResult]) -> None:
        """Answers come in any order; the refusal that counts is that of the first append refused."""
        while self._unanswered and (future := self._unanswered[0][1]).done():
            if future.cancelled():
                return
            status = future.result().status
            if status.code == code_pb2.OK:
                self._unanswered.popleft()
                continue
            refusal = from_status(status)
            if refusal.code in UNREACHED or refusal.reason_name == "QUEUE_FULL":
                self._post_again_when_answered()
                return
            self.trouble = self.trouble or refusal
            self._attention.alarm()
            return
        self._attention.hear_answer()

    def _post_again_when_answered(self) -> None:
        """Sends the first refused append and all after it again, in order and under the same ids, in a moment."""
        if self._retry is None and all(future.done() for _, future in self._unanswered):
            loop = asyncio.get_running_loop()
            self._retry = loop.call_later(RETRY_SECONDS * random.uniform(0.5, 1.0), self._post_again)

    def _post_again(self) -> None:
        self._retry = None
        if self._attention.is_abandoned:
            return
        refused = [append for append, _ in self._unanswered]
        self._unanswered.clear()
        for append in refused:
            self._post(append)


def ask(journal: Journal, question: events_pb2.ApprovalRequested) -> None:
    """Records a question under the id that its place in the log gives it."""
    question.approval_id = f"{journal.envelope.run_id}.{journal.progress.seq + 1}"
    journal.record(approval_requested=question)
