"""The one writer of logs in this process: group commit on a connection of its own, then the answers and the fan-out."""

from __future__ import annotations

import asyncio
import random
from collections import Counter as Counts
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import asyncpg
from mainspring.v1 import state_pb2
from mainspring_kit import postgres, telemetry
from mainspring_kit.errors import MainspringError, to_status
from prometheus_client import Counter, Histogram

from mainspring_state.core.append import Entry, check, stamp
from mainspring_state.core.backlog import Backlog, halves
from mainspring_state.core.refusals import refusal, refused_value, stale, unsettled
from mainspring_state.engine.hub import Creator, Hub
from mainspring_state.store.log import (
    LOCK_SECONDS_MAX,
    SEARCH_LOCK_SECONDS_MAX,
    Batch,
    LogWriter,
    Outcome,
    is_conflict,
    is_shortage,
)

RECONNECT_SECONDS_MAX: Final = 1.0
CONFLICT_SECONDS_MAX: Final = 0.5
CONFLICTS_MAX: Final = 8

BATCH_APPENDS: Final = Histogram(
    "mainspring_state_batch_appends", "Appends committed together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
)
APPENDS: Final = Counter("mainspring_state_appends", "Appends by what became of them.", ["outcome"])

# The connection is gone or does not answer: nobody knows what became of the statement under way.
_LOST: Final = (*postgres.UNREACHABLE, asyncpg.InterfaceError)

Answer = Callable[[state_pb2.AppendResult], None]


@dataclass(frozen=True, slots=True)
class Waiting:
    """An append in the queue, and who hears what became of it."""

    entry: Entry
    answer: Answer


class Committer:
    """Takes what has queued, commits it in one statement, answers, fans out, and takes what has queued meanwhile."""

    def __init__(
        self,
        database_url: str,
        hub: Hub,
        *,
        backlog: Backlog[Waiting],
        now: Callable[[], float],
        is_heard: Callable[[], bool],
        publish: Callable[[list[state_pb2.Delivery]], None],
        on_ready: Callable[[], None],
        on_input: Callable[[str, state_pb2.RunInput], None],
    ) -> None:
        """`now` tells the database's time in seconds, `is_heard` whether other state processes listen.

        `publish`, `on_ready` and `on_input`, which takes the holder of the run that is asked, never wait.
        """
        self._database_url = database_url
        self._hub = hub
        self._backlog = backlog
        self._now = now
        self._is_heard = is_heard
        self._publish = publish
        self._on_ready = on_ready
        self._on_input = on_input
        self._under_way: list[list[Waiting]] = []
        self._arrived = asyncio.Event()
        self.is_connected = False

    def submit(self, append: state_pb2.Append, answer: Answer) -> None:
        """Queues an append; what is wrong with it by itself is answered at once."""
        try:
            self._backlog.add(Waiting(check(append), answer))
        except MainspringError as error:
            APPENDS.labels("refused").inc()
            answer(_failure(append, error))
        else:
            self._arrived.set()

    async def run(self) -> None:
        """Commits as long as it is awaited. What was under way when the connection broke is sent again."""
        delay = 0.0
        while True:
            try:
                writer = await LogWriter.open(self._database_url)
            except _LOST as error:
                delay = min(max(delay * 2, 0.05), RECONNECT_SECONDS_MAX)
                telemetry.logger().warning("database_unreachable", detail=str(error)[:200])
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                continue
            delay = 0.0
            self.is_connected = True
            try:
                await self._commit_all(writer)
            except _LOST as error:
                telemetry.logger().warning("database_lost", under_way=len(self._under_way), detail=str(error)[:200])
            finally:
                self.is_connected = False
                writer.close()

    async def _commit_all(self, writer: LogWriter) -> None:
        conflicts = 0
        is_searching = False
        while True:
            if not self._under_way:
                if is_searching:
                    await writer.wait_for_locks(LOCK_SECONDS_MAX)
                    is_searching = False
                self._under_way.append(await self._take())
            waitings = self._under_way[-1]
            batch = Batch([waiting.entry for waiting in waitings])
            try:
                committed = await writer.commit(batch)
            except (TimeoutError, asyncpg.QueryCanceledError):
                # One of them may take as long whenever it comes: the halves go on alone, over a new connection.
                self._divide(unsettled)
                raise
            except asyncpg.LockNotAvailableError:
                # Somebody keeps a row of one of them: it is looked for at once, as all others wait for it.
                conflicts = 0
                self._divide(unsettled)
                if not is_searching:
                    await writer.wait_for_locks(SEARCH_LOCK_SECONDS_MAX)
                    is_searching = True
                continue
            except asyncpg.PostgresError as error:
                if isinstance(error, _LOST):
                    raise
                if is_shortage(error) or (is_conflict(error) and conflicts < CONFLICTS_MAX):
                    conflicts += 1
                    await asyncio.sleep(min(CONFLICT_SECONDS_MAX, 0.002 * 2 ** min(conflicts, 8)) * random.random())
                    continue
                conflicts = 0
                self._divide(unsettled if is_conflict(error) else partial(_refused, error))
                continue
            conflicts = 0
            self._under_way.pop()
            BATCH_APPENDS.observe(len(waitings))
            self._finish(waitings, committed.outcomes)
            for holder, run_input in committed.told:
                self._on_input(holder, run_input)
            if committed.became_ready:
                self._on_ready()

    async def _take(self) -> list[Waiting]:
        while not self._backlog:
            self._arrived.clear()
            await self._arrived.wait()
        waitings = self._backlog.take()
        seconds, nanos = divmod(int(self._now() * 1e6) * 1_000, 1_000_000_000)
        for waiting in waitings:
            stamp(waiting.entry, seconds=seconds, nanos=nanos)
        return waitings

    def _divide(self, verdict: Callable[[Entry], MainspringError]) -> None:
        """The batch under way could not be committed: its halves go on alone, down to the one that gets the verdict."""
        waitings = self._under_way.pop()
        if len(waitings) > 1:
            left, right = halves(waitings)
            self._under_way += [right, left]
            return
        entry, error = waitings[0].entry, verdict(waitings[0].entry)
        telemetry.logger().warning("append_refused", run_id=entry.append.run_id, detail=str(error)[:300])
        APPENDS.labels("refused").inc()
        waitings[0].answer(_failure(entry.append, error))

    def _finish(self, waitings: list[Waiting], outcomes: list[Outcome]) -> None:
        deliveries = []
        for waiting, outcome in zip(waitings, outcomes, strict=True):
            if outcome.is_ok:
                waiting.answer(_success(waiting.entry, outcome, followed=self._creator(waiting.entry) is not None))
            else:
                error = refusal(waiting.entry, outcome.reason, run_id=outcome.run_id, state=outcome.state)
                waiting.answer(_failure(waiting.entry.append, error))
                if outcome.reason == "stale":
                    self._fail_successors(waiting.entry)
            delivery = self._fan_out(waiting.entry, outcome)
            if delivery is not None:
                deliveries.append(delivery)
        self._publish(deliveries)
        for reason, count in Counts(outcome.reason or "committed" for outcome in outcomes).items():
            APPENDS.labels(reason).inc(count)

    def _creator(self, entry: Entry) -> Creator | None:
        """The follower whose start made the run, if it is connected here."""
        return self._hub.creators.get(entry.append.create.follower_id) if entry.is_create else None

    def _fail_successors(self, entry: Entry) -> None:
        for waiting in self._backlog.drop_successors(entry):
            APPENDS.labels("stale").inc()
            waiting.answer(_failure(waiting.entry.append, stale(waiting.entry)))

    def _fan_out(self, entry: Entry, outcome: Outcome) -> state_pb2.Delivery | None:
        """To the watchers here; gives what the other state processes must hear."""
        append, key = entry.append, entry.run_key
        creator = self._creator(entry)
        if not outcome.is_new:
            if outcome.reason != "repeated":
                return None
            # Its events were stamped anew: only the log knows what was committed the first time. If the answer got lost
            # then, nobody has been told.
            self._hub.mark_lagging(key)
            if creator is not None:
                creator.catch_up(key, append.create.user_id)
            return state_pb2.Delivery(run_id=append.run_id, tenant_id=append.tenant_id)
        if creator is not None:
            creator.join(key, outcome.user_id)
        if not outcome.events:
            return None
        if "agent_started" in entry.types:
            append.events[0].agent_started.ordinal = outcome.ordinal
        delivery = self._hub.take_in(key, outcome.user_id, events=append.events, encoded=outcome.events)
        if not self._is_heard():
            return None
        if delivery is not None and len(delivery.events) == len(append.events):
            return delivery
        return state_pb2.Delivery(
            run_id=append.run_id, tenant_id=append.tenant_id, user_id=outcome.user_id, events=append.events
        )


def _success(entry: Entry, outcome: Outcome, *, followed: bool) -> state_pb2.AppendResult:
    return state_pb2.AppendResult(
        item_id=entry.append.item_id,
        run_id=outcome.run_id,
        state=outcome.state,  # type: ignore[arg-type]  # the database holds numbers of the enum
        ordinal=outcome.ordinal if entry.is_create else 0,
        last_seq=outcome.last_seq,
        repeated_key=outcome.reason == "key_repeated",
        followed=followed and outcome.reason != "key_repeated",
    )


def _refused(error: asyncpg.PostgresError, entry: Entry) -> MainspringError:
    return refused_value(entry, f"{error.sqlstate} {str(error).splitlines()[0][:300]}")


def _failure(append: state_pb2.Append, error: MainspringError) -> state_pb2.AppendResult:
    return state_pb2.AppendResult(item_id=append.item_id, run_id=append.run_id, status=to_status(error))
