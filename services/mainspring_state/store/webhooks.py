"""The ends of runs that somebody outside has to be told of: taken by one process for a while, and settled."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from mainspring.v1 import types_pb2
from mainspring_kit import postgres

from mainspring_state.store.rows import to_run

_SQL: Final = postgres.load_queries("mainspring_state")


@dataclass(frozen=True, slots=True)
class DueWebhook:
    """Who is told of which run's end; `attempts` counts this one."""

    url: str
    credential: str
    attempts: int
    run: types_pb2.Run


class Webhooks:
    """The outbox."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def due(self, *, item_max: int, hold_seconds: float) -> list[DueWebhook]:
        """Takes what is due; another process gets what was not settled once `hold_seconds` are over."""
        with postgres.reachable():
            rows = await self._pool.fetch(_SQL["due_webhooks"], item_max, hold_seconds)
        return [DueWebhook(row["url"], row["credential"], row["attempts"], to_run(row)) for row in rows]

    async def settle(self, run: types_pb2.Run, *, is_done: bool, next_due: datetime | None, error: str) -> None:
        """Done: it is forgotten. Otherwise what went wrong, and when it is tried again; None: never."""
        with postgres.reachable():
            await self._pool.execute(
                _SQL["settle_webhook"], run.tenant_id, run.run_id, is_done, next_due, error.replace("\x00", "")[:1_000]
            )
