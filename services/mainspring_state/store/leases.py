"""Leases, beats, inputs and what else crosses tenants: calls of the database's definer functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit import postgres
from mainspring_kit.identity import UserExecutionContext

from mainspring_state.core.approvals import answerable_roles, read_id
from mainspring_state.store.rows import storable, to_input, to_run

STALLED_MAX: Final = 3
CLAIM_PAGE_MAX: Final = 64
INPUTS_MAX: Final = 1_000
# Of one kind and run.
UNCONSUMED_MAX: Final = 1_000

_SQL: Final = postgres.load_queries("mainspring_state")


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that was taken; `is_poisoned`: too many executors died on it, it was taken to be ended.

    `handed_back`: its former holder had let it go in the middle.
    """

    run: types_pb2.Run
    takeovers: int
    is_poisoned: bool
    handed_back: bool


@dataclass(frozen=True, slots=True)
class StoredInput:
    """The state of the asked run, who holds it (empty: nobody, or the input is not new), and the input.

    `reason`: why it was not stored, in the database's word; `decision`, `answered_by`, `expires_time`, `role`: of the
    approval that was answered.
    """

    reason: str
    state: int
    holder: str
    input: state_pb2.RunInput
    decision: int
    answered_by: str
    expires_time: datetime | None
    role: str


class Leases:
    """Who drives what, who is alive, and what is asked of runs."""

    def __init__(self, pool: postgres.Pool, state_id: str, *, lease_seconds: float) -> None:
        self._pool = pool
        self._state_id = state_id
        self._lease_seconds = lease_seconds

    async def meet_processes(self) -> tuple[list[str], datetime]:
        """Says that this process lives; answers the other living ones and the database's clock."""
        with postgres.reachable():
            row = await self._pool.fetchrow(_SQL["meet_processes"], self._state_id)
        assert row is not None, "the function returns one row"
        return list(row["state_ids"]), row["moment"]

    async def leave_processes(self) -> None:
        """Says that this process has left."""
        with postgres.reachable():
            await self._pool.execute(_SQL["leave_processes"], self._state_id)

    async def make_partitions(self, *, weeks_ahead: int) -> int:
        """Makes the log's partitions ahead; how many were new."""
        with postgres.reachable():
            made: int = await self._pool.fetchval(_SQL["make_partitions"], weeks_ahead)
        return made

    async def beat(self, executor_id: str, stream_id: str) -> None:
        """Stores a beat."""
        with postgres.reachable():
            await self._pool.execute(_SQL["beat"], executor_id, stream_id, self._lease_seconds)

    async def shorten_lease(self, executor_id: str, stream_id: str, *, seconds: float) -> None:
        """Less patience with an executor: its stream broke, or (no stream given) it leaves."""
        with postgres.reachable():
            await self._pool.execute(_SQL["shorten_lease"], executor_id, stream_id, seconds)

    async def claim(self, executor_id: str, *, credit: int, connected: datetime) -> list[Claim]:
        """Leases runs that nobody drives to the executor, so that it holds at most `credit` claimed ones."""
        with postgres.reachable():
            rows = await self._pool.fetch(
                _SQL["claim"],
                executor_id,
                credit,
                connected,
                self._state_id,
                self._lease_seconds,
                STALLED_MAX,
                CLAIM_PAGE_MAX,
            )
        return [Claim(to_run(row), row["takeovers"], row["stalled"] > STALLED_MAX, row["handed_back"]) for row in rows]

    async def disown(self, executor_id: str) -> None:
        """Claims of this process may not have reached the executor: unless their runs went on, they are claimable."""
        with postgres.reachable():
            await self._pool.execute(_SQL["disown"], self._state_id, executor_id)

    async def next_due(self) -> float | None:
        """In how many seconds the next run is due; None: none is."""
        with postgres.reachable():
            seconds: float | None = await self._pool.fetchval(_SQL["next_due"])
        return seconds

    async def tidy_ready(self) -> None:
        """Forgets claimables of runs that have ended."""
        with postgres.reachable():
            await self._pool.execute(_SQL["tidy_ready"])

    async def inputs_of(self, runs: Sequence[types_pb2.Run]) -> list[state_pb2.RunInput]:
        """The unconsumed inputs of some runs."""
        with postgres.reachable():
            rows = await self._pool.fetch(
                _SQL["inputs_of"], [run.tenant_id for run in runs], [run.run_id for run in runs]
            )
        return [to_input(row) for row in rows]

    async def inputs_for(self, executor_ids: Sequence[str]) -> list[tuple[str, state_pb2.RunInput]]:
        """The unconsumed inputs of all runs that some executors hold, each with its holder."""
        with postgres.reachable():
            rows = await self._pool.fetch(_SQL["inputs_for"], list(executor_ids), INPUTS_MAX)
        return [(row["executor_id"], to_input(row)) for row in rows]

    async def put_input(
        self, user: UserExecutionContext, run_input: state_pb2.RunInput, *, is_holder: bool
    ) -> StoredInput | None:
        """Stores an input once per request id; None when the user has no such run, or may not see the approval."""
        asked = state_pb2.RunInput()
        asked.CopyFrom(run_input)
        for field in ("request_id", "run_id", "tenant_id", "requested_by"):
            asked.ClearField(field)
        approval = read_id(run_input.approval.approval_id)
        with postgres.reachable(), storable():
            row = await self._pool.fetchrow(
                _SQL["put_input"],
                user.tenant_id,
                user.user_id,
                run_input.run_id,
                run_input.request_id,
                run_input.requested_by,
                asked.WhichOneof("input"),
                asked.SerializeToString(),
                UNCONSUMED_MAX,
                approval[1] if approval else 0,
                run_input.approval.decision,
                run_input.approval.data,
                answerable_roles(user.roles),
                is_holder,
            )
        if row is None:
            return None
        return StoredInput(
            row["reason"],
            row["state"],
            row["holder"] or "",
            to_input(row) if row["payload"] is not None else state_pb2.RunInput(),
            row["decision"] or 0,
            row["answered_by"] or "",
            row["expires_time"],
            row["role"] or "",
        )

    async def last_seqs(self, runs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """How far the logs of runs (tenant, run) have come."""
        with postgres.reachable():
            rows = await self._pool.fetch(
                _SQL["last_seqs"], [tenant_id for tenant_id, _ in runs], [run_id for _, run_id in runs]
            )
        return {(row["tenant_id"], str(row["run_id"])): row["last_seq"] for row in rows}

    async def read_log(self, run: tuple[str, str], *, after_seq: int, item_max: int, byte_max: int) -> list[bytes]:
        """A page of the log of a run (tenant, run) whose watchers were checked when they subscribed."""
        with postgres.reachable():
            rows = await self._pool.fetch(_SQL["read_log"], run[0], run[1], after_seq, item_max, byte_max)
        return [row["event"] for row in rows]
