"""What people look after: approvals, what runs cost, why a run stands still. Under row-level security, as `reads`."""

from __future__ import annotations

from typing import Final

from mainspring.v1 import events_pb2, types_pb2
from mainspring_kit import postgres
from mainspring_kit.identity import UserExecutionContext

from mainspring_state.core.approvals import answerable_roles
from mainspring_state.core.holds import TAIL_EVENTS, Circumstances, Place
from mainspring_state.core.pages import ApprovalMark
from mainspring_state.store.rows import as_user, to_approval, to_event, to_metrics, to_timestamp

RUNS_SHOWN_MAX: Final = 10
_EVENTS_BYTES_MAX: Final = 4 << 20
_LAST_RUN_ID: Final = "ffffffff-ffff-ffff-ffff-ffffffffffff"

_SQL: Final = postgres.load_queries("mainspring_state")


class Oversight:
    """Reads over the user's own runs, and over those of others as far as the user's roles go."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def get_approval(self, user: UserExecutionContext, run_id: str, *, seq: int) -> types_pb2.Approval | None:
        """An approval of the user's or that the user may answer; None: there is no such."""
        async with as_user(self._pool, user) as connection:
            await connection.execute(_SQL["answer_as"], ",".join(answerable_roles(user.roles)))
            row = await connection.fetchrow(_SQL["get_approval"], user.tenant_id, run_id, seq)
        return None if row is None else to_approval(row)

    async def list_approvals(
        self, user: UserExecutionContext, *, run_id: str, is_open: bool, before: ApprovalMark, page_size: int
    ) -> list[types_pb2.Approval]:
        """Approvals older than the mark, newest first; `is_open`: only those that are not over."""
        roles = answerable_roles(user.roles)
        mark = (before.create_time, before.run_id, before.seq)
        statement = _SQL["list_open_approvals"] if is_open else _SQL["list_approvals"]
        arguments = [user.tenant_id, user.user_id, *mark, page_size, "operator" in roles, "admin" in roles]
        if run_id:
            statement = _SQL["list_approvals_of_run"]
            arguments = [user.tenant_id, run_id, *mark, page_size, not is_open]
        async with as_user(self._pool, user) as connection:
            await connection.execute(_SQL["answer_as"], ",".join(roles))
            rows = await connection.fetch(statement, *arguments)
        return [to_approval(row) for row in rows]

    async def list_metrics(
        self,
        user: UserExecutionContext,
        *,
        agent: str,
        run_id: str,
        since_run_id: str,
        before_run_id: str,
        page_size: int,
    ) -> list[types_pb2.RunMetrics]:
        """What ended runs of the tenant cost, of ids from `since_run_id` on, those before the mark, newest first."""
        first, last = since_run_id, before_run_id or _LAST_RUN_ID
        async with as_user(self._pool, user) as connection:
            if run_id:
                rows = await connection.fetch(_SQL["get_run_metrics"], user.tenant_id, run_id, last, first, agent)
            else:
                rows = await connection.fetch(_SQL["list_run_metrics"], user.tenant_id, last, first, agent, page_size)
        return [to_metrics(row) for row in rows]

    async def circumstances(self, user: UserExecutionContext, run: types_pb2.Run) -> Circumstances:
        """What the database knows of why a run that has not ended does not go on."""
        async with as_user(self._pool, user) as connection:
            facts = await connection.fetchrow(_SQL["circumstances"], user.tenant_id, user.user_id, run.run_id)
            approvals = await connection.fetch(_SQL["open_approvals_of"], user.tenant_id, run.run_id, RUNS_SHOWN_MAX)
            places = await connection.fetch(_SQL["places_of"], user.tenant_id, user.user_id, run.run_id)
            subs = await connection.fetch(_SQL["open_sub_runs"], user.tenant_id, run.run_id, RUNS_SHOWN_MAX)
            events = await connection.fetch(
                _SQL["read_events"], user.tenant_id, user.user_id, run.run_id, max(0, run.last_seq - TAIL_EVENTS),
                TAIL_EVENTS, _EVENTS_BYTES_MAX,
            )  # fmt: skip
        assert facts is not None, "the run was read before, and runs are not deleted"
        tail: list[events_pb2.RunEvent] = [to_event(row["event"]) for row in events]
        return Circumstances(
            executor_id=facts["holder"] or "",
            is_alive=facts["is_alive"],
            alive_count=facts["alive_count"],
            due_time=to_timestamp(facts["due_time"]),
            before=[str(run_id) for run_id in facts["before"] or []],
            before_count=facts["before_count"] or 0,
            approvals=[to_approval(row) for row in approvals],
            sub_run_ids=[str(row["run_id"]) for row in subs],
            tail=tail,
            places=[
                Place(
                    row["kind"],
                    row["cap"],
                    row["cap_limit"],
                    run_ids=[str(run_id) for run_id in row["holders"]],
                    position=row["place"],
                    until=to_timestamp(row["until"]),
                )
                for row in places
            ],
        )
