"""The schedules: what a tenant has put, and which of all tenants' are due. Decides nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

from mainspring.v1 import registry_pb2, types_pb2
from mainspring_kit import postgres
from mainspring_kit.identity import UserExecutionContext

from mainspring_registry.core import catalog
from mainspring_registry.core.schedules import schedule_not_found

if TYPE_CHECKING:
    import asyncpg

_SQL: Final = postgres.load_queries("mainspring_registry")


@dataclass(frozen=True, slots=True)
class Due:
    """A schedule whose time has come, and which this process alone fires now."""

    tenant_id: str
    schedule: registry_pb2.Schedule
    next_time: datetime


@dataclass(frozen=True, slots=True)
class Fired:
    """What a firing came to. `time` None: nothing was started, and nothing is to be told of it."""

    next_time: datetime | None
    time: datetime | None = None
    run_id: str = ""
    error: types_pb2.RunError | None = None


class Schedules:
    """The table of schedules."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def put(
        self, user: UserExecutionContext, schedule: registry_pb2.Schedule, *, next_time: datetime | None
    ) -> registry_pb2.Schedule:
        """Stores a schedule of the user's tenant, in the place of one of its name."""
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            row = await connection.fetchrow(
                _SQL["put_schedule"],
                user.tenant_id,
                schedule.name,
                user.user_id,
                schedule.cron,
                schedule.time_zone,
                schedule.agent,
                schedule.alias,
                schedule.input.decode(),
                schedule.missed,
                schedule.overlap,
                schedule.paused,
                next_time,
            )
        assert row is not None, "an insert that returns its row"
        return _to_schedule(row)

    async def get(self, user: UserExecutionContext, name: str) -> registry_pb2.Schedule:
        """A schedule of the user's tenant. SCHEDULE_NOT_FOUND."""
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            row = await connection.fetchrow(_SQL["read_schedule"], user.tenant_id, name)
        if row is None:
            raise schedule_not_found(name)
        return _to_schedule(row)

    async def list_page(
        self, user: UserExecutionContext, request: registry_pb2.ListSchedulesRequest
    ) -> tuple[Sequence[registry_pb2.Schedule], str]:
        """A page of the tenant's schedules by name, and the token of the next."""
        size, after = catalog.read_page_size(request.page_size), catalog.read_token(request.page_token)
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            rows = await connection.fetch(_SQL["list_schedules"], user.tenant_id, after, size + 1)
        token = catalog.write_token(rows[size - 1]["name"]) if len(rows) > size else ""
        return [_to_schedule(row) for row in rows[:size]], token

    async def delete(self, user: UserExecutionContext, name: str) -> None:
        """Forgets a schedule. SCHEDULE_NOT_FOUND."""
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            if await connection.fetchval(_SQL["delete_schedule"], user.tenant_id, name) is None:
                raise schedule_not_found(name)

    async def take_due(self, *, items_max: int, busy_seconds: float) -> list[Due]:
        """Schedules of all tenants that are due; no other process gets them for so long."""
        with postgres.reachable():
            rows = await self._pool.fetch(_SQL["take_due_schedules"], items_max, busy_seconds)
        return [Due(row["tenant_id"], _to_schedule(row), row["next_time"]) for row in rows]

    async def settle(self, due: Due, fired: Fired) -> None:
        """Keeps what a firing came to, unless the schedule was put anew meanwhile."""
        error = None
        if fired.error is not None:
            error = json.dumps({"code": fired.error.code, "reason": fired.error.reason, "message": fired.error.message})
        with postgres.reachable():
            await self._pool.execute(
                _SQL["settle_schedule"],
                due.tenant_id,
                due.schedule.name,
                due.next_time,
                fired.next_time,
                fired.time,
                fired.run_id,
                error,
            )


def _to_schedule(row: asyncpg.Record) -> registry_pb2.Schedule:
    return registry_pb2.Schedule(
        name=row["name"],
        cron=row["cron"],
        time_zone=row["time_zone"],
        agent=row["agent"],
        alias=row["alias"],
        input=row["input"].encode(),
        user_id=row["user_id"],
        missed=row["missed"],
        overlap=row["overlap"],
        paused=row["paused"],
        create_time=row["create_time"],
        next_time=row["next_time"],
        last_time=row["last_time"],
        last_run_id=row["last_run_id"],
        last_error=None if row["last_error"] is None else types_pb2.RunError(**json.loads(row["last_error"])),
    )
