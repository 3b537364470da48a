"""The board: which call runs where, and what happens to it when a worker comes, answers, leaves or dies.

It has no clock: whoever calls it says what time it is, in seconds of one monotonic clock. A tenant's own tool wins over
a shared one of its name; the least loaded worker goes first; a call is executed again only if its effect allows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_dispatcher.core import outcomes
from mainspring_dispatcher.core.answers import answer, join, tell
from mainspring_dispatcher.core.lines import Lines
from mainspring_dispatcher.core.memory import Memory
from mainspring_dispatcher.core.parts import (
    TOOL_UNKNOWN,
    Call,
    Caller,
    Cancel,
    Counts,
    Link,
    ToolFacts,
    ToolKey,
    Worker,
    facts_of,
)

SILENT_SECONDS: Final = 3.0  # a worker beats each second
# How long a worker whose stream broke may take to come back for calls that only it may finish.
RETURN_SECONDS: Final = 3.0
# How long a call waits for a tool that nobody serves now: a restarted worker is back by then, also on a busy machine.
UNSERVED_SECONDS: Final = 10.0
UNKNOWN_SECONDS: Final = 0.5  # how long for a tool that nobody has heard of: its registration may be on its way here
CANCEL_SECONDS: Final = 4.8  # how long a worker may take to say that a call stopped: CancelCalls answers within 5 s
EXECUTIONS_MAX: Final = 3


class Board:
    """All calls under way in this process, and all workers attached to it."""

    def __init__(self, *, first_dispatch_id: int, waiting_max: int, workers_max: int) -> None:
        self.counts = Counts()
        self.lines = Lines(waiting_max)
        self.catalogue_complete = False
        self._workers_max = workers_max
        # No other process may have used its numbers: a worker may come back with results of a former one's calls.
        self._dispatch_id = first_dispatch_id
        self._order = 0
        self._facts: dict[ToolKey, ToolFacts] = {}
        self._calls: dict[tuple[str, str], Call] = {}
        self._workers: dict[tuple[str, str], Worker] = {}
        self._offers: dict[ToolKey, list[Worker]] = {}
        self._memory = Memory()
        self._due = math.inf

    @property
    def under_way(self) -> int:
        """How many calls wait or run."""
        return len(self._calls)

    @property
    def has_unrepeatable(self) -> bool:
        """Whether any call under way must not be executed again."""
        return any(not call.repeatable for call in self._calls.values())

    @property
    def attached(self) -> int:
        """How many workers are attached."""
        return sum(worker.link is not None for worker in self._workers.values())

    def learn(self, tenant_id: str, tool: types_pb2.Tool, *, now: float) -> None:
        """Takes a tool into the catalogue; tenant "" means everybody's. Calls that wait for its name look again."""
        key = (tenant_id, tool.name)
        known = key in self._facts
        self._facts[key] = facts_of(tool)
        if not known and self.lines.count:
            # Backwards, since each goes to the front of its line.
            for call in reversed(self.lines.take_named(tool.name)):
                self._appoint(call)
                self._place(call, now)

    def submit(self, message: pb.ToolCall, caller: Caller, *, now: float) -> None:
        """Takes a call: sends it, lets it wait, joins it to the one under way, or answers at once."""
        fault = outcomes.refusal(message)
        if fault is not None:
            answer(message, [(caller, message.item_id)], outcome=outcomes.failed(fault))
            return
        tenant_id, call_id = message.context.tenant_id, message.call_id
        under_way = self._calls.get((tenant_id, call_id))
        if under_way is not None:
            join(under_way, caller, item_id=message.item_id)
            return
        kept = self._memory.recall(message)
        if kept is not None:
            answer(message, [(caller, message.item_id)], outcome=kept[0], executions=kept[1])
            return
        key, facts = self._resolve(tenant_id, message.tool)
        worker = self._pick(key)
        if worker is None and self.lines.full:
            answer(message, [(caller, message.item_id)], outcome=outcomes.crowded(self.lines.count))
            return
        timeout_seconds = (
            message.timeout.ToNanoseconds() / 1e9 if message.HasField("timeout") else facts.timeout_seconds
        )
        self._order += 1
        call = Call(
            message=message,
            key=key,
            facts=facts,
            order=self._order,
            since=now,
            deadline=now + timeout_seconds,
            timeout_seconds=timeout_seconds,
            callers=[(caller, message.item_id)],
        )
        self.counts.calls += 1
        self._calls[call.identity] = call
        if worker is not None:
            self._dispatch(call, worker, now=now)
        else:
            self._wait(call, now)

    def attach(self, tenant_id: str, hello: pb.AttachHello, *, link: Link, now: float) -> Worker:
        """A worker is there, for the first time or again; it goes on with what it had. Its tools are learnt already."""
        worker = self._workers.get((tenant_id, hello.worker_id))
        if worker is None:
            if len(self._workers) >= self._workers_max:
                raise MainspringError(
                    Reason.QUEUE_FULL,
                    f"{self._workers_max} workers are attached here and no more may be: attach to another dispatcher.",
                    queue="workers",
                    limit=self._workers_max,
                )
            worker = self._workers[tenant_id, hello.worker_id] = Worker(tenant_id, hello.worker_id)
        elif worker.link is not None:
            self._withdraw(worker, now)
            worker.link.close("the worker attached again")
        worker.link = link
        worker.keys = tuple((tenant_id, tool.name) for tool in hello.tools)
        worker.concurrency = hello.concurrency
        worker.draining = False
        worker.seen = now
        self._wake_at(now + SILENT_SECONDS)
        for key in worker.keys:
            self._offers.setdefault(key, []).append(worker)
        self._take_up(worker, link, known=frozenset(hello.known_dispatch_ids), now=now)
        self._fill(worker, now)
        return worker

    def drain(self, worker: Worker, *, now: float) -> None:
        """The worker takes no more calls; what it has it finishes."""
        if not worker.draining:
            worker.draining = True
            self._withdraw(worker, now)

    def detach(self, worker: Worker, link: Link, *, now: float, returns: bool) -> None:
        """The worker's stream ended. Its calls go to others if they may; the rest waits a little for its return."""
        if worker.link is not link:
            return  # it has attached again meanwhile
        self._withdraw(worker, now)
        worker.link = None
        worker.seen = now
        if not (returns and worker.calls):
            self._bury(worker, now)
            return
        self._wake_at(now + RETURN_SECONDS)
        # Backwards, since each goes to the front of its line.
        for dispatch_id, call in reversed(list(worker.calls.items())):
            if call is None or call.dispatch_id != dispatch_id:
                continue
            if call.cancelled_time is not None:
                self._settle(call, outcomes.cancelled(call.key[1], call.message.call_id), now=now)
            elif call.repeatable and call.executions < EXECUTIONS_MAX:
                self._place(call, now)

    def finish(self, worker: Worker, result: pb.WorkerResult, *, now: float) -> None:
        """A worker's word on how a call ended. A dispatch that was given up is matched by its id or counted as late."""
        call = worker.calls.pop(result.dispatch_id, None)
        if call is None:
            self.counts.results_late += 1
        else:
            outcome = outcomes.checked(result, call.key[1])
            call.workers.pop(result.dispatch_id, None)
            self._settle(call, outcome, now=now, acknowledged=outcome.status == outcomes.CANCELLED)
        self._fill(worker, now)

    def acknowledge(self, worker: Worker, call_id: str, *, now: float) -> None:
        """A worker's word that a cancel took effect; the outcome follows."""
        for call in worker.calls.values():
            if call is not None and call.message.call_id == call_id:
                tell(call, now=now, acknowledged=True)
                return

    def cancel(self, tenant_id: str, call_id: str, *, told: Callable[[pb.CancelOutcome], None], now: float) -> None:
        """Cancels a call; `told` is called once: now when nothing runs, else when the worker said so or time is up."""
        call = self._calls.get((tenant_id, call_id))
        if call is None:
            told(pb.CancelOutcome(call_id=call_id, found=False))
            return
        call.cancels.append(Cancel(now, told))
        call.cancelled_time = call.cancelled_time or now
        if not call.workers:
            self._settle(call, outcomes.cancelled(call.key[1], call_id), now=now, acknowledged=True)
            return
        self.lines.remove(call)
        self._wake_at(now + CANCEL_SECONDS)
        for dispatch_id, worker in call.workers.items():
            if worker.link is not None:
                worker.link.cancel(dispatch_id)

    def tick(self, now: float) -> None:
        """Does what is due by time alone: silent workers, deadlines, cancels. Cheap when nothing is."""
        self._memory.forget(now)
        if now < self._due:
            return
        self._due = math.inf
        for worker in list(self._workers.values()):
            self._check_worker(worker, now)
        for call, unserved_time in self.lines.standing():
            self._check_waiting(call, unserved_time, now=now)
        for call in list(self._calls.values()):
            due = call.deadline if call.cancelled_time is None else call.cancelled_time + CANCEL_SECONDS
            if now < due:
                self._wake_at(due)
            elif call.cancelled_time is None:
                self._settle(call, outcomes.timed_out(call.key[1], call.timeout_seconds, waiting=False), now=now)
            else:
                self._settle(call, outcomes.cancelled(call.key[1], call.message.call_id), now=now)

    def _check_worker(self, worker: Worker, now: float) -> None:
        if worker.link is None:
            if now >= worker.seen + RETURN_SECONDS:
                self._bury(worker, now)
            else:
                self._wake_at(worker.seen + RETURN_SECONDS)
        elif now >= worker.seen + SILENT_SECONDS:
            link = worker.link
            self.detach(worker, link, now=now, returns=False)
            link.close(f"no beat came for {SILENT_SECONDS:g} s")
        else:
            self._wake_at(worker.seen + SILENT_SECONDS)

    def _check_waiting(self, call: Call, unserved_time: float, *, now: float) -> None:
        if call.key in self._offers:
            if now >= call.deadline:
                self._settle(call, outcomes.timed_out(call.key[1], call.timeout_seconds, waiting=True), now=now)
            return
        is_known = call.key in self._facts or not self.catalogue_complete
        due = min(unserved_time + (UNSERVED_SECONDS if is_known else UNKNOWN_SECONDS), call.deadline)
        if now < due:
            self._wake_at(due)
        elif call.workers:
            return  # a worker that broke off with it may still come back
        else:
            outcome = outcomes.unserved(call.key[1]) if is_known else outcomes.unknown(call.key[1])
            self._settle(call, outcome, now=now)

    def _resolve(self, tenant_id: str, name: str) -> tuple[ToolKey, ToolFacts]:
        """Which tool a name means for a tenant: its own, else everybody's, else one nobody has heard of."""
        for key in ((tenant_id, name), ("", name)):
            facts = self._facts.get(key)
            if facts is not None:
                return key, facts
        return (tenant_id, name), TOOL_UNKNOWN

    def _appoint(self, call: Call) -> None:
        """Finds the tool of a call again."""
        call.key, call.facts = self._resolve(call.identity[0], call.message.tool)

    def _pick(self, key: ToolKey) -> Worker | None:
        """The least loaded worker that takes another call of the tool."""
        free = [worker for worker in self._offers.get(key, ()) if worker.takes_calls]
        return min(free, key=lambda worker: worker.load) if len(free) > 1 else free[0] if free else None

    def _place(self, call: Call, now: float) -> None:
        """Sends a call that was taken from elsewhere, or puts it in front of its line."""
        worker = self._pick(call.key)
        if worker is not None:
            self._dispatch(call, worker, now=now)
        else:
            self._wait(call, now, in_front=True)

    def _wait(self, call: Call, now: float, *, in_front: bool = False) -> None:
        call.dispatch_id = 0
        self.lines.add(call, now, in_front=in_front)
        self._wake_at(min(now + UNKNOWN_SECONDS, call.deadline))

    def _dispatch(self, call: Call, worker: Worker, *, now: float) -> None:
        assert worker.link is not None
        self._dispatch_id += 1
        call.dispatch_id = self._dispatch_id
        call.executions += 1
        call.workers[call.dispatch_id] = worker
        worker.calls[call.dispatch_id] = call
        self.counts.dispatches += 1
        self._wake_at(call.deadline)
        message = call.message
        out = pb.WorkerCall(
            dispatch_id=call.dispatch_id,
            context=message.context,
            call_id=message.call_id,
            tool=message.tool,
            arguments=message.arguments,
            attempt=max(message.attempt, 1) + call.executions - 1,
        )
        out.timeout.FromNanoseconds(int(max(min(call.facts.timeout_seconds, call.deadline - now), 0.001) * 1e9))
        worker.link.call(out)

    def _fill(self, worker: Worker, now: float) -> None:
        """Gives a worker what waits, as far as it has places."""
        while self.lines.count and worker.takes_calls:
            call = self.lines.take_next(worker)
            if call is None:
                return
            self._dispatch(call, worker, now=now)

    def _withdraw(self, worker: Worker, now: float) -> None:
        """Takes back what the worker offered."""
        for key in worker.keys:
            offers = self._offers.get(key)
            if offers is not None and worker in offers:
                offers.remove(worker)
                if not offers:
                    del self._offers[key]
                    self.lines.desert(key, now)
                    self._wake_at(now + UNKNOWN_SECONDS)

    def _take_up(self, worker: Worker, link: Link, *, known: frozenset[int], now: float) -> None:
        """Goes on with what a returning worker knows, and without what it does not."""
        for dispatch_id, call in reversed(list(worker.calls.items())):
            if dispatch_id not in known:
                self._lose(worker, dispatch_id, now=now)
            elif call is None or call.cancelled_time is not None:
                link.cancel(dispatch_id)
            elif call.dispatch_id == 0:
                # It has been put back in line, but here it still runs, or has run.
                self.lines.remove(call)
                call.dispatch_id = dispatch_id

    def _bury(self, worker: Worker, now: float) -> None:
        """The worker will not come back."""
        self._workers.pop((worker.tenant_id, worker.worker_id), None)
        if worker.calls:
            self.counts.workers_lost += 1
        # Backwards, since each may go to the front of its line.
        for dispatch_id in reversed(list(worker.calls)):
            self._lose(worker, dispatch_id, now=now)

    def _lose(self, worker: Worker, dispatch_id: int, *, now: float) -> None:
        """The worker will not answer this dispatch: the call goes to another one, or is lost."""
        call = worker.calls.pop(dispatch_id)
        if call is None:
            return
        call.workers.pop(dispatch_id, None)
        if call.dispatch_id != dispatch_id:
            return  # it waits, or runs elsewhere
        if call.cancelled_time is not None:
            self._settle(call, outcomes.cancelled(call.key[1], call.message.call_id), now=now)
        elif call.repeatable and call.executions < EXECUTIONS_MAX:
            self._place(call, now)
        else:
            outcome = outcomes.lost(call.key[1], call.message.call_id, executions=call.executions)
            self._settle(call, outcome, now=now)

    def _settle(self, call: Call, outcome: pb.WorkerResult, *, now: float, acknowledged: bool = False) -> None:
        """The call's one end: answers all who wait, ends what else runs of it."""
        if self._calls.pop(call.identity, None) is None:
            return
        self.lines.remove(call)
        for dispatch_id, worker in call.workers.items():
            worker.calls[dispatch_id] = None
            if worker.link is not None and call.cancelled_time is None:
                worker.link.cancel(dispatch_id)
        if not call.repeatable:
            self._memory.keep(call, outcome, now=now)
        answer(call.message, call.callers, outcome=outcome, executions=call.executions)
        tell(call, now=now, acknowledged=acknowledged)

    def _wake_at(self, time: float) -> None:
        if time < self._due:
            self._due = time
