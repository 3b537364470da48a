"""The other half of the model of the database: beats, claims, processes, and what users read. See `tables`."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from tests.simulation.asking import FIRST_ENDED, QUEUED, RUNNING, Key, Row, moment_of
from tests.simulation.tables import PEER_SECONDS, Tables

FORGET_SECONDS: Final = 1.0


class Schema(Tables):
    """All functions of the schema `state`, by the names of the queries that call them."""

    def beat(self, executor_id: str, stream_id: str, lease_seconds: float) -> None:
        """`state.beat`."""
        self.executors[executor_id, stream_id] = [self.now(), lease_seconds]

    def shorten_lease(self, executor_id: str, stream_id: str, lease_seconds: float) -> None:
        """`state.shorten_lease`."""
        for (name, stream), beat in self.executors.items():
            if name == executor_id and stream_id in ("", stream):
                beat[1] = min(beat[1], lease_seconds)

    def disown(self, state_id: str, executor_id: str) -> None:
        """`state.disown`."""
        for lease in self.leases.values():
            if lease["claim_state_id"] == state_id and lease["executor_id"] == executor_id:
                lease["claim_state_id"] = ""

    def silent(self, connected: float) -> set[str]:
        """Executors that are held for dead."""
        ends: dict[str, float] = {}
        for (name, _), (beat_time, lease_seconds) in self.executors.items():
            since = max(beat_time, connected) if lease_seconds > 0 else beat_time
            ends[name] = max(ends.get(name, 0.0), since + lease_seconds)
        return {name for name, end in ends.items() if end <= self.now()}

    def claim(
        self, executor_id: str, credit: int, connected: datetime, state_id: str, full_lease_seconds: float,
        stalled_max: int, page_max: int,
    ) -> list[Row]:  # fmt: skip
        """`state.claim_runs`."""
        now, since = self.now(), connected.timestamp()
        silent = self.silent(since)
        known = {name for name, _ in self.executors}
        # Of a lease that is older, nobody will ever hear.
        patience = now - full_lease_seconds if since + full_lease_seconds <= now else -1e12
        if executor_id in silent or executor_id not in known:
            return []
        held = [lease for lease in self.leases.values() if lease["executor_id"] == executor_id]
        room = min(page_max, credit - sum(lease["claim_seq"] is not None for lease in held))
        found: list[tuple[Key, bool]] = []
        for key, lease in list(self.leases.items()):
            if len(found) >= room:
                break
            if self._is_abandoned(key, lease, silent=silent, known=known, patience=patience):
                is_dead = lease["executor_id"] in silent or lease["executor_id"] not in known
                found.append((key, is_dead))
        claimed = [self._take_run(key, executor_id, state_id, stalled_max if dead else None) for key, dead in found]
        runs = [run for run in claimed if run is not None]
        due = sorted((moment, key) for key, moment in self.ready.items() if moment <= now and key not in self.leases)
        for _, key in due:
            if len(runs) < room and (self.runs[key]["state"] >= FIRST_ENDED or self.may_go(key)):
                run = self._take_run(key, executor_id, state_id, None)
                runs += [] if run is None else [run]
        while len(runs) < room and (next_key := self.next_in_line()) is not None:
            if self.runs[next_key]["state"] == QUEUED:
                self.runs[next_key]["state"] = RUNNING
            run = self._take_run(next_key, executor_id, state_id, None)
            runs += [] if run is None else [run]
        self.settle_lines()
        self._forget_executors(full_lease_seconds, silent)
        return runs

    def _is_abandoned(self, key: Key, lease: Row, *, silent: set[str], known: set[str], patience: float) -> bool:
        executor_id, now = lease["executor_id"], self.now()
        if executor_id in silent:
            return True
        if lease["create_time"] > patience:
            return False
        if executor_id not in known:
            return True
        is_served = self.processes.get(lease["claim_state_id"], -1e9) + PEER_SECONDS > now
        return lease["claim_seq"] is not None and not is_served and self.runs[key]["last_seq"] == lease["claim_seq"]

    def _take_run(self, key: Key, executor_id: str, state_id: str, stalled_max: int | None) -> Row | None:
        run, former = self.runs[key], self.leases.get(key)
        self.forget_ready(key)
        if run["state"] >= FIRST_ENDED:
            self.leases.pop(key, None)
            return None
        handed_back = run["state"] == RUNNING and run["last_seq"] > 0
        if former is not None:
            handed_back = former["handed_back"] and stalled_max is None
        takes_over = stalled_max is not None
        if stalled_max is not None and run["stalled"] >= stalled_max:
            executor_id = state_id
        run["epoch"] += 1
        run["takeovers"] += takes_over
        run["stalled"] += takes_over
        self._lease(key, run["epoch"], executor_id)
        self.leases[key] |= {"claim_seq": run["last_seq"], "claim_state_id": state_id, "handed_back": handed_back}
        return run | {"handed_back": handed_back}

    def _forget_executors(self, full_lease_seconds: float, silent: set[str]) -> None:
        holders = {lease["executor_id"] for lease in self.leases.values()}
        for (name, stream), (beat_time, lease_seconds) in list(self.executors.items()):
            is_old = beat_time + max(lease_seconds, full_lease_seconds) <= self.now()
            if is_old and (name not in silent or name not in holders):
                del self.executors[name, stream]

    def next_due(self) -> float | None:
        """`state.next_due`."""
        return min((due - self.now() for due in self.ready.values() if self.now() < due < float("inf")), default=None)

    def tidy_ready(self) -> None:
        """`state.tidy_ready`."""
        for key, moment in list(self.ready.items()):
            if moment <= self.now() - FORGET_SECONDS and self.runs[key]["state"] >= FIRST_ENDED:
                self.forget_ready(key)

    def meet_processes(self, state_id: str) -> Row:
        """`state.meet_processes`."""
        self.processes[state_id] = now = self.now()
        living = [name for name, beat in self.processes.items() if name != state_id and beat > now - PEER_SECONDS]
        return {"state_ids": living, "moment": moment_of(now)}

    def leave_processes(self, state_id: str) -> None:
        """`state.leave_processes`."""
        self.processes.pop(state_id, None)

    def make_partitions(self, weeks_ahead: int) -> int:
        """`state.make_partitions`."""
        return 0

    def due_webhooks(self, item_max: int, hold_seconds: float) -> list[Row]:
        """Nobody outside is told of ends here."""
        return []

    def get_run(self, tenant_id: str, user_id: str, run_id: str) -> Row | None:
        """One run of the user."""
        run = self.runs.get((tenant_id, run_id))
        return dict(run) if run is not None and run["user_id"] == user_id else None

    def read_events(
        self, tenant_id: str, user_id: str, run_id: str, after_seq: int, item_max: int, byte_max: int
    ) -> list[Row]:
        """A page of a run's log, if it is the user's."""
        if self.get_run(tenant_id, user_id, run_id) is None:
            return []
        return self.read_log(tenant_id, run_id, after_seq, item_max, byte_max)

    def held_by(self, key: Key) -> str:
        """Who holds the run; empty: nobody."""
        lease = self.leases.get(key)
        return "" if lease is None else str(lease["executor_id"])
