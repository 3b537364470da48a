"""What the registry does when nobody calls: keeps the catalog's watchers going, and fires schedules."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Final

import grpc
from mainspring.v1 import execution_pb2, registry_pb2, types_pb2
from mainspring_kit import postgres, telemetry
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import UserExecutionContext, new_id
from mainspring_kit.tasks import raise_if_cancelled

from mainspring_registry.core import catalog
from mainspring_registry.core.schedules import idempotency_key, plan_firing, session_id
from mainspring_registry.peers import Execution
from mainspring_registry.store.catalog import Store, open_revisions
from mainspring_registry.store.schedules import Due, Fired, Schedules

# Watchers are promised a beat each 250 ms; the rest is for the look itself.
TICK_SECONDS: Final = 0.2
RECONNECT_SECONDS: Final = 0.2
SCHEDULE_SECONDS: Final = 0.5
# A process that dies while it fires leaves the schedule to another one after this long.
FIRING_SECONDS: Final = 30.0
DUE_MAX: Final = 16

# Execution gave no verdict: the same start again does no harm, its key names the same run.
_UNDECIDED: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)


class CatalogWatch:
    """The newest revision as PostgreSQL last told it, and the streams that wait for the next time it does.

    Each look at PostgreSQL is one tick, each tick moves every stream: by a change or by a beat. While PostgreSQL cannot
    be reached there are no ticks, so no beats, and watchers know that their copies may be stale.
    """

    def __init__(self, store: Store, database_url: str, *, watchers_max: int) -> None:
        self._store = store
        self._database_url = database_url
        self._watchers_max = watchers_max
        self._watchers = 0
        self._revision = 0
        self._tick = asyncio.Event()
        self._draining = False
        self._connected = False

    def is_connected(self) -> bool:
        """Whether the last look at PostgreSQL succeeded."""
        return self._connected

    async def run(self) -> None:
        """Looks for changes until it is cancelled."""
        while True:
            try:
                await self._look()
            except postgres.UNREACHABLE as error:
                if self._connected:
                    telemetry.logger().warning("catalog_unreachable", error=repr(error))
                self._connected = False
            await asyncio.sleep(RECONNECT_SECONDS)

    def drain(self) -> None:
        """Ends all streams; watchers go to another process."""
        self._draining = True
        self._move()

    async def frames(self, after_revision: int) -> AsyncIterator[registry_pb2.WatchCatalogResponse]:
        """Every change after a revision, each as soon as it is known, and a beat at each tick without one.

        Frames of a first copy have revision 0 until it is complete. QUEUE_FULL, DRAINING, PEER_UNAVAILABLE.
        """
        if self._watchers >= self._watchers_max:
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"{self._watchers_max} watchers are served here already: try another registry process.",
                queue="watchers",
                limit=self._watchers_max,
            )
        self._watchers += 1
        try:
            newest = await self._store.read_revision()
            seen = catalog.begin_watch(after_revision, newest)
            while not self._draining:
                # Taken before the reads: a tick that comes during them is not missed.
                tick = self._tick
                newest = max(newest, self._revision)
                is_first_copy = seen == 0
                while seen < newest and (frame := await self._store.read_changes(seen)):
                    seen = frame.revision
                    if is_first_copy:
                        frame.revision = 0
                    yield frame
                # Revisions of which nothing is left, or that were never used, are seen too.
                seen = max(seen, newest)
                yield registry_pb2.WatchCatalogResponse(revision=seen)
                await tick.wait()
        finally:
            self._watchers -= 1
        raise MainspringError(Reason.DRAINING, "The registry process stops: watch at another one.", peer="registry")

    async def _look(self) -> None:
        async with open_revisions(self._database_url) as revisions:
            while True:
                self._revision = await revisions.read()
                self._connected = True
                self._move()
                await revisions.wait(TICK_SECONDS)

    def _move(self) -> None:
        """Wakes every stream, once."""
        self._tick.set()
        self._tick = asyncio.Event()


class Clockwork:
    """Fires the schedules of all tenants; of several processes each fires what no other is at."""

    def __init__(self, schedules: Schedules, execution: Execution) -> None:
        self._schedules = schedules
        self._execution = execution

    async def run(self) -> None:
        """Looks for what is due as long as it is awaited."""
        while True:
            try:
                due = await self._schedules.take_due(items_max=DUE_MAX, busy_seconds=FIRING_SECONDS)
                for entry in due:
                    await self._fire(entry)
            except MainspringError as error:
                telemetry.logger().debug("schedules_delayed", detail=str(error)[:200])
                due = []
            raise_if_cancelled()
            if len(due) < DUE_MAX:
                await asyncio.sleep(SCHEDULE_SECONDS)

    async def _fire(self, due: Due) -> None:
        """Starts the runs of one schedule, oldest time first, and keeps what came of it."""
        firing = plan_firing(due.schedule, due.next_time, now=datetime.now(UTC))
        fired = Fired(firing.next_time)
        for moment in firing.times:
            try:
                run_id = await self._start(due, moment)
            except MainspringError as error:
                if error.code in _UNDECIDED:
                    # From this time on it is tried again.
                    fired = Fired(moment, fired.time, fired.run_id, fired.error)
                    break
                fault = types_pb2.RunError(code=error.code.name, reason=error.reason_name, message=error.message)
                fired = Fired(firing.next_time, moment, error=fault)
                telemetry.logger().info(
                    "schedule_refused", schedule=due.schedule.name, tenant_id=due.tenant_id, reason=error.reason_name
                )
            else:
                fired = Fired(firing.next_time, moment, run_id)
                telemetry.logger().info(
                    "schedule_fired", schedule=due.schedule.name, tenant_id=due.tenant_id, run_id=run_id
                )
        await self._schedules.settle(due, fired)

    async def _start(self, due: Due, moment: datetime) -> str:
        schedule = due.schedule
        user = UserExecutionContext(
            tenant_id=due.tenant_id,
            user_id=schedule.user_id,
            session_id=session_id(schedule),
            run_id=new_id(),
            request_id=new_id(),
            roles=("runner",),
        )
        request = execution_pb2.StartRunRequest(
            agent=schedule.agent,
            alias=schedule.alias,
            input=schedule.input,
            session_id=user.session_id,
            idempotency_key=idempotency_key(schedule, moment),
            session_policy=schedule.overlap,
        )
        return (await self._execution.start_run(user, request)).run_id
