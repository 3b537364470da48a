"""Faults put into the product, or into the model where SQL has the rule, to show that histories find them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final

from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_execution.core import decision, policy, thought, waits
from mainspring_execution.core.progress import Progress, fold
from mainspring_execution.engine import calls, claims, drive
from mainspring_execution.engine.ending import Ending
from mainspring_execution.engine.lease import Lease
from mainspring_execution.engine.waiting import Waiting
from mainspring_execution.peers import Dispatcher
from mainspring_kit import streams
from mainspring_state.core.feed import Feed
from mainspring_state.engine import follower
from mainspring_state.engine.committer import Committer
from mainspring_state.engine.talk import Talk

from tests.simulation.asking import RUNNING, Asking, Key
from tests.simulation.leasing import Schema
from tests.simulation.lining import Lining
from tests.simulation.tables import Tables

# Any in this module: what replaces an attribute is of the attribute's type.
Patch = tuple[object, str, Any]


def _yes(*_: object, **__: object) -> bool:
    return True


def _no(*_: object, **__: object) -> bool:
    return False


def _nothing(*_: object, **__: object) -> None:
    return


def _fold_without_outcomes() -> Callable[..., Progress]:
    def forgetful(events: Iterable[events_pb2.RunEvent]) -> Progress:
        progress = fold(events)
        progress.outcomes.clear()
        return progress

    return forgetful


def _deliver_early() -> Callable[..., Any]:
    take = Committer._take

    async def take_and_tell(self: Committer) -> Any:
        waitings = await take(self)
        for waiting in waitings:
            entry, feed = waiting.entry, self._hub._watched.get(waiting.entry.run_key)
            if feed is not None and not entry.is_create:
                self._hub.take_in(entry.run_key, feed.user_id, events=entry.append.events)
        return waitings

    return take_and_tell


def _end_twice() -> Callable[..., None]:
    end = Ending._end

    def end_twice(self: Ending, **payload: Any) -> None:
        end(self, **payload)
        end(self, **payload)

    return end_twice


def _since_one_earlier() -> Callable[..., list[bytes] | None]:
    since = Feed.since
    return lambda self, after_seq: since(self, max(0, after_seq - 1))


def _settle_one_ahead() -> Callable[..., None]:
    settle = Feed.settle
    return lambda self, seq: settle(self, seq + 1)


def _no_silence(self: Schema, connected: float) -> set[str]:
    """Who has not beaten for a moment is dead."""
    return {name for (name, _), (beat_time, _) in self.executors.items() if beat_time + 0.6 <= self.now()}


def _anybodys_run(self: Schema, tenant_id: str, user_id: str, run_id: str) -> Any:
    run = self.runs.get((tenant_id, run_id))
    return None if run is None else dict(run)


async def _heal_nothing(self: Talk, feeds: Any) -> bool:
    return True


def _count_ids() -> Callable[..., str]:
    numbers = iter(range(1 << 40))

    def make(run_id: str, seq: int, *, index: int) -> str:
        return f"{run_id}.{next(numbers)}.{index}"

    return make


def _release_blindly(self: Asking, key: Key, due: datetime | None) -> bool:
    if due is not None:
        self.make_ready(key, due.timestamp())
    self.leases.pop(key, None)
    return False


def _answer_again() -> Callable[..., str]:
    refuse = Asking._refusal

    def refuse_less(self: Asking, key: Key, **asked: Any) -> str:
        reason = refuse(self, key, **asked)
        return "" if reason == "resolved" else reason

    return refuse_less


def _keep_leave() -> Callable[..., None]:
    recover = Progress._recover

    def recover_with_leave(self: Progress, recovered: events_pb2.RunRecovered) -> None:
        answers = dict(self.answers)
        recover(self, recovered)
        self.answers = answers

    return recover_with_leave


def _forget_pauses() -> Callable[..., None]:
    take = Waiting._take

    def take_others(self: Waiting, request: state_pb2.RunInput) -> None:
        if request.HasField("pause"):
            self._journal.consume(request.request_id)
        else:
            take(self, request)

    return take_others


def _pause_without_stopping(self: Waiting) -> None:
    assert self.pause_input is not None
    paused = events_pb2.AgentPaused(request_id=self.pause_input.request_id)
    self._journal.consume(self.pause_input.request_id)
    self.pause_input = None
    self._journal.record(agent_paused=paused)
    self._journal.progress.paused = False


def _resume_at_once() -> Callable[..., bool]:
    resume = Waiting._resume

    def resume_whatever(self: Waiting, request: state_pb2.RunInput) -> bool:
        resume(self, request)
        return True

    return resume_whatever


def _keep_signals() -> Callable[..., None]:
    complete = Progress._complete

    def complete_only(self: Progress, outcome: events_pb2.ToolCompleted, *, is_own: bool) -> None:
        signals = list(self.signals)
        complete(self, outcome, is_own=is_own)
        self.signals = signals

    return complete_only


def _count_hand_backs() -> Callable[..., Any]:
    take = Schema._take_run

    def take_over(self: Schema, key: Key, *where: Any) -> Any:
        if key not in self.leases and self.runs[key]["state"] == RUNNING:
            self.runs[key]["takeovers"] += 1
        return take(self, key, *where)

    return take_over


def _take_for_lost() -> Callable[..., None]:
    record = drive.Drive.record_recovery
    return lambda self, **known: record(self, **known | {"handed_back": False})


def _one_more() -> Callable[..., bool]:
    take = Lining.take_slots

    def take_one_more(self: Lining, key: Key) -> bool:
        caps = self.runs[key]["caps"]
        self.runs[key]["caps"] = [(scope, cap + 1) for scope, cap in caps]
        taken = take(self, key)
        self.runs[key]["caps"] = caps
        return taken

    return take_one_more


def _wake_early() -> Callable[..., float]:
    wake_time = waits.wake_time
    return lambda intent: wake_time(intent) - 1.5


def _mutations() -> dict[str, list[Patch]]:
    return {
        "the epoch is not checked": [(Tables, "is_holder", _yes)],
        "the seq is not checked": [(Tables, "is_next", _yes)],
        "append ids are not compared": [(Tables, "is_repeat", _no)],
        "finished calls are made again": [(module, "fold", _fold_without_outcomes()) for module in (claims, drive)],
        "events are delivered before the commit": [(Committer, "_take", _deliver_early())],
        "the join begins an event too early": [(Feed, "since", _since_one_earlier())],
        "the join takes the log for an event longer": [(Feed, "settle", _settle_one_ahead())],
        "gaps are not seen": [(Feed, "misses", _no)],
        "missed events are not read": [(Talk, "_heal_all", _heal_nothing)],
        "the lease is not looked at": [(Lease, "is_held", property(_yes))],
        "living executors are taken for dead": [(Schema, "silent", _no_silence)],
        "call ids are not of the seq": [(thought, "make_call_id", _count_ids())],
        "the end is appended twice": [(Ending, "_end", _end_twice()), (Tables, "is_legal", _yes)],
        "effects do not wait for their intent": [(calls, "needs_durable_intent", _no)],
        "unsafe calls are made again after a takeover": [(decision, "may_repeat", _yes)],
        "unsafe calls that failed are made again": [(calls, "Failure", _as_if_pure())],
        "calls are made again before their time": [(Progress, "retry_times", property(lambda _: {}, lambda *_: None))],
        "a broken stream sends unsafe calls again": [(Dispatcher, "__init__", _dispatcher_without_loss())],
        "a broken stream sends nothing again": [(streams._Link, "rewind", _rewind_nothing)],
        "a release does not look at what came meanwhile": [(Asking, "release", _release_blindly)],
        "an approval is answered twice": [(Asking, "_refusal", _answer_again())],
        "leave for an unsafe call is used again": [(Progress, "_recover", _keep_leave())],
        "a pause is forgotten": [(Waiting, "_take", _forget_pauses())],
        "a resume does not wait for its pause": [(Waiting, "_resume", _resume_at_once())],
        "a pause stops nothing": [(Waiting, "pause", _pause_without_stopping)],
        "a signal is taken twice": [(Progress, "_complete", _keep_signals())],
        "a hand-back counts as a takeover": [(Schema, "_take_run", _count_hand_backs())],
        "a hand-back is taken for a loss": [(drive.Drive, "record_recovery", _take_for_lost())],
        "a cap lets one more in": [(Lining, "take_slots", _one_more())],
        "sleeps end early": [(waits, "wake_time", _wake_early())],
        "the ends of sub-runs are not told": [(Tables, "_tell_parent", _nothing)],
        "provider state is shown": [(follower, "public", list)],
        "rows of others are shown": [(Schema, "get_run", _anybodys_run)],
    }


def _as_if_pure() -> Callable[..., policy.Failure]:
    def make(error: types_pb2.RunError, attempt: int, effect: object, executions: int) -> policy.Failure:
        return policy.Failure(error, attempt, types_pb2.EFFECT_CLASS_PURE, executions)

    return make


def _dispatcher_without_loss() -> Callable[..., None]:
    make = Dispatcher.__init__

    def init(self: Dispatcher, peer: Any) -> None:
        make(self, peer)
        self.calls._lost = lambda _: None

    return init


def _rewind_nothing(self: Any, lost: object) -> None:
    self.unsent.clear()


MUTATIONS: Final = _mutations()


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """While the block runs, the product is wrong in this way."""
    patches = MUTATIONS[name] if name else []
    originals = [vars(owner)[attribute] for owner, attribute, _ in patches]
    for owner, attribute, replacement in patches:
        setattr(owner, attribute, replacement)
    try:
        yield
    finally:
        for (owner, attribute, _), original in zip(patches, originals, strict=True):
            setattr(owner, attribute, original)
