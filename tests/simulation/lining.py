"""The part of the model of the database that holds lines and caps. See `tables`.

Where the migration keeps lanes, watchers and a virtual time, this looks at all who wait, each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime

from tests.simulation.asking import QUEUED, RUNNING, Asking, Key, Row
from tests.simulation.batch import Batch

PARALLEL = 4
NEVER = float("inf")

SessionKey = tuple[str, str, str]


class Lining(Asking):
    """Who waits for a session's turn, for a time, for slots and for an executor."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(now)
        self.sessions: dict[SessionKey, Row] = {}
        self.queued: dict[SessionKey, dict[int, str]] = {}
        # A tenant's place among all, how many of its runs are QUEUED, and its weight.
        self.shares: dict[str, Row] = {}
        # By tenant and scope: the cap, and how much of it is used.
        self.caps: dict[tuple[str, str], list[int]] = {}
        self.slots: dict[Key, list[str]] = {}
        self.cap_line: set[Key] = set()
        self.in_line: set[Key] = set()

    def leave_session(self, run: Row, *, moved: list[SessionKey], was_started: bool) -> None:
        """A run that ended leaves its session's line, which moves on if its turn had come."""
        session_key = (run["tenant_id"], run["user_id"], run["session_id"])
        session = self.sessions.get(session_key)
        if session is None:
            return
        if not was_started:
            session["waiting"] -= self.queued.get(session_key, {}).pop(run["ordinal"], "") != ""
            self.forget_ready((run["tenant_id"], run["run_id"]))
        if session["head_run_id"] == run["run_id"]:
            session["head_run_id"] = None
            if session["waiting"] > 0:
                moved.append(session_key)

    def move_session(self, session_key: SessionKey) -> Key | None:
        """Whose turn in the session has come."""
        line = self.queued.get(session_key)
        if not line:
            return None
        run_id = line.pop(min(line))
        session = self.sessions[session_key]
        session["head_run_id"] = run_id
        session["waiting"] -= 1
        return session_key[0], run_id

    def share(self, tenant_id: str) -> Row:
        """The tenant's, made when it is needed first."""
        empty = {"queued": 0, "weight": 1, "pass": 0.0, "is_lined": False}
        return self.shares.setdefault(tenant_id, empty)

    def count(self, tenant_id: str, change: int, *, weight: int = 0) -> None:
        """So many of the tenant's runs are QUEUED more."""
        share = self.share(tenant_id)
        share["queued"] += change
        share["weight"] = weight or share["weight"]

    def overflows(self, batch: Batch, i: int, counts: Counter[tuple[str, str]]) -> bool:
        """Whether a create would be one QUEUED run too many; `counts` is what those before it in the batch bring."""
        tenant_id, caps = batch.tenants[i], batch.caps_of(i)
        session = self.sessions.get((tenant_id, batch.users[i], batch.session_ids[i]))
        is_busy = session is not None and session["policy"] != PARALLEL and session["head_run_id"] is not None
        is_full = any(
            self.caps.get((tenant_id, scope), [0, 0])[1] + counts[tenant_id, scope] >= cap for scope, cap in caps
        )
        if not (is_busy or is_full or batch.is_queue_only(i) or batch.due(i) is not None):
            counts.update((tenant_id, scope) for scope, _ in caps)
            return False
        if self.shares.get(tenant_id, {"queued": 0})["queued"] + counts[tenant_id, ""] >= batch.backlogs[i]:
            return True
        counts[tenant_id, ""] += 1
        return False

    def set_caps(self, tenant_id: str, caps: list[tuple[str, int]]) -> bool:
        """`state.set_caps`."""
        for scope, cap in caps:
            if (tenant_id, scope) in self.caps:
                self.caps[tenant_id, scope][0] = cap
        return self.give_slots(tenant_id)

    def take_slots(self, key: Key) -> bool:
        """`state.take_slots`."""
        run = self.runs[key]
        rows = [self.caps.get((key[0], scope), [cap, 0]) for scope, cap in run["caps"]]
        if any(used >= cap for cap, used in rows):
            return False
        for (scope, _), row in zip(run["caps"], rows, strict=True):
            self.caps[key[0], scope] = [row[0], row[1] + 1]
        self.slots[key] = [scope for scope, _ in run["caps"]]
        return True

    def give_slots(self, tenant_id: str) -> bool:
        """Whoever of the tenant's can have all slots gets them, by priority and age."""
        waiting = sorted((key for key in self.cap_line if key[0] == tenant_id), key=self.place_of)
        given = [key for key in waiting if self.take_slots(key)]
        for key in given:
            self.cap_line.discard(key)
            self.enter_line(key)
        return bool(given)

    def free_slots(self, key: Key) -> None:
        """`state.free_slots`."""
        self.cap_line.discard(key)
        scopes = self.slots.pop(key, None)
        for scope in scopes or ():
            self.caps[key[0], scope][1] -= 1
            if not self.caps[key[0], scope][1]:
                del self.caps[key[0], scope]

    def place_of(self, key: Key) -> tuple[int, str]:
        """By priority, then by age."""
        return -self.runs[key]["priority"], key[1]

    def enter_line(self, key: Key) -> None:
        """`state.enter_line`."""
        self.ready.setdefault(key, NEVER)
        self.in_line.add(key)
        share = self.share(key[0])
        if not share["is_lined"]:
            lined = [each["pass"] for each in self.shares.values() if each["is_lined"]]
            idle = [each["pass"] for each in self.shares.values() if not each["is_lined"]]
            share |= {"is_lined": True, "pass": max(share["pass"], min(lined, default=max(idle)))}

    def lead_on(self, key: Key, *, may_begin: bool, waits_first: bool = False) -> str:
        """`state.lead_on`."""
        run = self.runs[key]
        if run["due_time"] is not None and run["due_time"].timestamp() > self.now():
            self.make_ready(key, run["due_time"].timestamp())
            return "waits"
        if run["caps"] and (waits_first or not self.take_slots(key)):
            self.cap_line.add(key)
            return "waits"
        if may_begin:
            return "begins"
        self.enter_line(key)
        return "lined"

    def may_go(self, key: Key) -> bool:
        """`state.may_go`."""
        run = self.runs[key]
        is_late = run["deadline"] is not None and run["deadline"].timestamp() <= self.now()
        if run["state"] == RUNNING or (run["state"] != QUEUED and not run["caps"]) or is_late:
            return True
        if any(asked["kind"] == "cancel" for asked in self.unconsumed(key)):
            return True
        again: datetime | None = run["deadline"]
        if run["state"] == QUEUED and run["due_time"] is not None and run["due_time"].timestamp() > self.now():
            again = run["due_time"]
        elif key in self.slots:
            if run["state"] != QUEUED:
                return True
        elif key not in self.cap_line and key not in self.in_line and self._has_turn(key):
            if run["state"] == QUEUED:
                self.lead_on(key, may_begin=False)
            elif self.take_slots(key):
                return True
            else:
                self.cap_line.add(key)
        self.ready[key] = NEVER if again is None else again.timestamp()
        return False

    def next_in_line(self) -> Key | None:
        """Whose turn it is, of all who stand in line for an executor; it leaves the line."""
        claimable = sorted((key for key in self.in_line if key not in self.leases), key=self.place_of)
        tenants = {key[0]: key for key in reversed(claimable)}
        if not tenants:
            return None
        key = tenants[min(tenants, key=lambda tenant_id: (self.shares[tenant_id]["pass"], tenant_id))]
        share = self.shares[key[0]]
        share["pass"] += 1 / share["weight"]
        return key

    def settle_lines(self) -> None:
        """Tenants without a run in line are not served."""
        for tenant_id, share in self.shares.items():
            share["is_lined"] = any(key[0] == tenant_id for key in self.in_line)

    def forget_ready(self, key: Key) -> None:
        """Nobody has to take the run up any more."""
        self.ready.pop(key, None)
        self.in_line.discard(key)

    def _has_turn(self, key: Key) -> bool:
        run = self.runs[key]
        if run["state"] != QUEUED:
            return True
        session = self.sessions[key[0], run["user_id"], run["session_id"]]
        return bool(session["policy"] == PARALLEL or session["head_run_id"] == key[1])
