"""A small model of the database of state: what its functions do to its tables, one statement at a time.

`tests/contract/test_state_machine.py` binds it to the real thing. It is written item by item, where the migration works
on sets; a rule that a test wants to break is a method of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

# Any: a row is what its table's columns are.
Row = dict[str, Any]
Key = tuple[str, str]

QUEUED, RUNNING, FIRST_ENDED = 1, 2, 5
ENQUEUE, REJECT, INTERRUPT, PARALLEL = 1, 2, 3, 4
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
PEER_SECONDS: Final = 5.0


def moment_of(seconds: float) -> datetime:
    """Seconds since 1970 as the database gives them."""
    return EPOCH + timedelta(microseconds=int(seconds * 1e6))


def varint(value: int) -> bytes:
    """A protobuf varint."""
    encoded = b""
    while value > 127:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])


def ordinal_field(ordinal: int) -> bytes:
    """What is put behind an agent_started: its ordinal."""
    field = b"\x18" + varint(ordinal)
    return b"\xa2\x01" + varint(len(field)) + field


class Tables:
    """The schema `state`. `now`: the database's clock in seconds; `on_commit` sees each run's new events."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.on_commit: Callable[[Key, list[Row], int], None] = lambda key, events, epoch: None
        self.on_grant: Callable[[Key, int, str], None] = lambda key, epoch, executor_id: None
        self.runs: dict[Key, Row] = {}
        self.events: dict[Key, list[Row]] = {}
        self.sessions: dict[tuple[str, str, str], Row] = {}
        self.queued: dict[tuple[str, str, str], dict[int, str]] = {}
        self.ready: dict[Key, float] = {}
        self.leases: dict[Key, Row] = {}
        self.inputs: dict[Key, dict[str, Row]] = {}
        self.keys: dict[tuple[str, str, str], tuple[str, bytes]] = {}
        self.executors: dict[tuple[str, str], list[float]] = {}
        self.processes: dict[str, float] = {}

    def append(self, *arguments: Any) -> Row:
        """`state.append`."""
        batch = _Batch(arguments)
        row: Row = {name: [] for name in ("made", "made_running", "made_ordinals", "hit", "hit_users", "hit_ordinals")}
        row |= {f"missed{part}": [] for part in ("", "_reasons", "_runs", "_states", "_seqs", "_ordinals")}
        row["became_ready"] = False
        moved: list[tuple[str, str, str]] = []
        for i in range(batch.create_count):
            self._create(batch, i, row)
        for i in range(batch.create_count, len(batch.runs)):
            self._advance(batch, i, row=row, moved=moved)
        for session_key in moved:
            self._move_line(session_key, row)
        return row

    def fits(self, run: Row, *, seq: int, epoch: int) -> bool:
        """Whether an append continues the log as its holder."""
        return bool(self.is_next(run, seq) and self.is_holder(run, epoch))

    def is_next(self, run: Row, seq: int) -> bool:
        """Whether the log ends where the append expects it."""
        return bool(run["last_seq"] == seq)

    def is_holder(self, run: Row, epoch: int) -> bool:
        """Whether the append is of the newest epoch."""
        return bool(run["epoch"] == epoch)

    def is_legal(self, run: Row, from_states: int) -> bool:
        """Whether the event may come in the run's state."""
        return bool(from_states >> run["state"] & 1)

    def is_repeat(self, key: Key, seq: int, append_id: str) -> bool:
        """Whether the append was made before."""
        events = self.events.get(key, [])
        return len(events) > seq and bool(events[seq]["append_id"] == append_id)

    def _create(self, batch: _Batch, i: int, row: Row) -> None:
        tenant_id, run_id = key = (batch.tenants[i], batch.runs[i])
        user_id, session_id, policy = batch.users[i], batch.session_ids[i], batch.policies[i]
        found = self.runs.get(key)
        if found is not None:
            state = QUEUED if found["state"] == RUNNING and found["epoch"] > 1 else found["state"]
            reason = "repeated" if found["append_id"] == batch.append_ids[i] else "exists"
            _miss(row, i, reason, run=found | {"state": state})
            return
        idempotency_key = batch.keys[i] if batch.keys else ""
        known = self.keys.get((tenant_id, user_id, idempotency_key)) if idempotency_key else None
        if known is not None:
            reason = "key_repeated" if known[1] == batch.hashes[i] else "key_reused"
            _miss(row, i, reason, run=self.runs[tenant_id, known[0]])
            return
        session_key = (tenant_id, user_id, session_id)
        session = self.sessions.get(session_key)
        if session is None:
            session = self.sessions[session_key] = self.make_session(session_key, policy)
        elif session["policy"] == REJECT and session["head_run_id"] is not None:
            _miss(row, i, "busy", run={"run_id": run_id})
            return
        is_running = session["policy"] == PARALLEL or session["head_run_id"] is None
        session["run_count"] += 1
        session["last_run_id"] = run_id
        if session["policy"] != PARALLEL:
            session["head_run_id"] = session["head_run_id"] or run_id
            session["waiting"] += not is_running
        ordinal = session["run_count"]
        self.runs[key] = self._make_run(batch, i, ordinal=ordinal, is_running=is_running)
        row["made"].append(i + 1)
        row["made_running"].append(is_running)
        row["made_ordinals"].append(ordinal)
        if idempotency_key:
            self.keys[tenant_id, user_id, idempotency_key] = (run_id, batch.hashes[i])
        if is_running:
            self._lease(key, 1, batch.executors[i])
            self._log(batch, i, user_id=user_id, ordinal=ordinal)
            return
        self.queued.setdefault(session_key, {})[ordinal] = run_id
        if batch.deadlines[i] is not None:
            self.ready[key] = batch.deadlines[i].timestamp()
        if session["policy"] == INTERRUPT:
            head = (tenant_id, session["head_run_id"])
            self._ask(head, request_id=run_id, requested_by=user_id, payload=batch.interrupt_payload)
            self._make_ready(head)
            row["became_ready"] = True

    def make_session(self, key: tuple[str, str, str], policy: int) -> Row:
        """A new row of `sessions`."""
        moment = moment_of(self.now())
        return {
            "tenant_id": key[0],
            "user_id": key[1],
            "session_id": key[2],
            "policy": policy,
            "title": "",
            "run_count": 0,
            "head_run_id": None,
            "last_run_id": None,
            "waiting": 0,
            "create_time": moment,
            "update_time": moment,
        }

    def _make_run(self, batch: _Batch, i: int, *, ordinal: int, is_running: bool) -> Row:
        moment = moment_of(self.now())
        empty = dict.fromkeys(("end_time", "released_time", "result", "error", "stages", "usage"))
        return empty | {
            "run_id": batch.runs[i],
            "tenant_id": batch.tenants[i],
            "user_id": batch.users[i],
            "session_id": batch.session_ids[i],
            "append_id": batch.append_ids[i],
            "ordinal": ordinal,
            "last_seq": int(is_running),
            "epoch": 1,
            "create_time": moment,
            "start_time": moment if is_running else None,
            "deadline": batch.deadlines[i],
            "takeovers": 0,
            "stalled": 0,
            "state": QUEUED + is_running,
            "agent": batch.agents[i],
            "agent_version": batch.versions[i],
            "trace_id": batch.traces[i],
            "input": batch.run_inputs[i],
        }

    def _advance(self, batch: _Batch, i: int, *, row: Row, moved: list[tuple[str, str, str]]) -> None:
        key = (batch.tenants[i], batch.runs[i])
        run, seq, epoch = self.runs.get(key), batch.expected_seqs[i], batch.epochs[i]
        if run is None:
            _miss(row, i, "unknown", run={"run_id": batch.runs[i]})
            return
        if not self.fits(run, seq=seq, epoch=epoch) or not self.is_legal(run, batch.from_states[i]):
            if self.is_repeat(key, seq, batch.append_ids[i]):
                reason = "repeated"
            elif not self.fits(run, seq=seq, epoch=epoch):
                reason = "stale"
            else:
                reason = "ended" if run["state"] >= FIRST_ENDED else "illegal"
            _miss(row, i, reason, run=run)
            return
        is_end = i + 1 >= batch.end_first
        was_started = run["start_time"] is not None
        moment = moment_of(self.now())
        run["last_seq"] += batch.event_lasts[i] - batch.event_firsts[i] + 1
        run["state"] = batch.to_states[i]
        run["stalled"] = 0 if batch.progresses[i] else run["stalled"]
        if seq == 0 and not is_end:
            run["start_time"] = moment
        self._log(batch, i, user_id=run["user_id"], ordinal=run["ordinal"])
        for consumed, request_id in zip(batch.consumed_items, batch.consumed_requests, strict=True):
            asked = self.inputs.get(key, {}).get(request_id) if consumed == i + 1 else None
            if asked is not None and asked["consumed_seq"] is None:
                asked["consumed_seq"] = run["last_seq"]
        row["hit"].append(i + 1)
        row["hit_users"].append(run["user_id"])
        row["hit_ordinals"].append(run["ordinal"])
        if is_end:
            ending = i + 1 - batch.end_first
            run["end_time"] = run["released_time"] = moment
            run["result"], run["error"] = batch.results[ending], batch.errors[ending]
            run["stages"], run["usage"] = batch.all_stages[ending], batch.usages[ending]
            self.leases.pop(key, None)
            self._leave_line(run, moved=moved, was_started=was_started)

    def _leave_line(self, run: Row, *, moved: list[tuple[str, str, str]], was_started: bool) -> None:
        session_key = (run["tenant_id"], run["user_id"], run["session_id"])
        session = self.sessions[session_key]
        if not was_started:
            session["waiting"] -= self.queued.get(session_key, {}).pop(run["ordinal"], "") != ""
            self.ready.pop((run["tenant_id"], run["run_id"]), None)
        if session["head_run_id"] == run["run_id"]:
            session["head_run_id"] = None
            if session["waiting"] > 0:
                moved.append(session_key)

    def _move_line(self, session_key: tuple[str, str, str], row: Row) -> None:
        line = self.queued.get(session_key)
        if line:
            run_id = line.pop(min(line))
            session = self.sessions[session_key]
            session["head_run_id"] = run_id
            session["waiting"] -= 1
            self._make_ready((session_key[0], run_id))
            row["became_ready"] = True

    def _log(self, batch: _Batch, i: int, *, user_id: str, ordinal: int) -> None:
        key = (batch.tenants[i], batch.runs[i])
        made = []
        for offset, k in enumerate(range(batch.event_firsts[i] - 1, batch.event_lasts[i])):
            event = batch.events[k]
            made.append(
                {
                    "seq": batch.expected_seqs[i] + offset + 1,
                    "append_id": batch.append_ids[i],
                    "user_id": user_id,
                    "type": batch.types[k],
                    "event": event + ordinal_field(ordinal) if batch.types[k] == "agent_started" else event,
                }
            )
        self.events.setdefault(key, []).extend(made)
        self.on_commit(key, made, batch.epochs[i])

    def _lease(self, key: Key, epoch: int, executor_id: str) -> None:
        lease = {"executor_id": executor_id, "claim_seq": None, "claim_state_id": None, "create_time": self.now()}
        self.leases[key] = lease
        self.on_grant(key, epoch, executor_id)

    def _make_ready(self, key: Key) -> None:
        self.ready[key] = min(self.ready.get(key, self.now()), self.now())

    def _ask(self, key: Key, *, request_id: str, requested_by: str, payload: bytes) -> Row | None:
        """A new input, None if the request made it before."""
        inputs = self.inputs.setdefault(key, {})
        if request_id in inputs:
            return None
        inputs[request_id] = {
            "tenant_id": key[0],
            "run_id": key[1],
            "request_id": request_id,
            "requested_by": requested_by,
            "payload": payload,
            "create_time": moment_of(self.now()),
            "consumed_seq": None,
        }
        return inputs[request_id]

    def put_input(
        self, tenant_id: str, user_id: str, run_id: str, request_id: str, requested_by: str, payload: bytes
    ) -> Row | None:
        """`state.put_input`."""
        key = (tenant_id, run_id)
        run = self.runs.get(key)
        if run is None or run["user_id"] != user_id:
            return None
        stored = self.inputs.get(key, {}).get(request_id)
        holder = None
        if stored is None and run["state"] < FIRST_ENDED:
            stored = self._ask(key, request_id=request_id, requested_by=requested_by, payload=payload)
            lease = self.leases.get(key)
            if lease is None:
                self._make_ready(key)
            else:
                holder = lease["executor_id"]
        return {"state": run["state"], "holder": holder, **(stored or {"payload": None})}

    def inputs_of(self, tenants: Sequence[str], run_ids: Sequence[str]) -> list[Row]:
        """`state.inputs_of`."""
        return [
            row
            for key in zip(tenants, run_ids, strict=True)
            for row in self.inputs.get(key, {}).values()
            if row["consumed_seq"] is None
        ]

    def inputs_for(self, executor_ids: Sequence[str], item_max: int) -> list[Row]:
        """`state.inputs_for`."""
        found = []
        for key, inputs in self.inputs.items():
            lease = self.leases.get(key)
            if lease is None or lease["executor_id"] not in executor_ids:
                continue
            found += [
                row | {"executor_id": lease["executor_id"]} for row in inputs.values() if row["consumed_seq"] is None
            ]
        return found[:item_max]

    def last_seqs(self, tenants: Sequence[str], run_ids: Sequence[str]) -> list[Row]:
        """`state.last_seqs`."""
        keys = [key for key in zip(tenants, run_ids, strict=True) if key in self.runs]
        return [{"tenant_id": key[0], "run_id": key[1], "last_seq": self.runs[key]["last_seq"]} for key in keys]

    def read_log(self, tenant_id: str, run_id: str, after_seq: int, item_max: int, byte_max: int) -> list[Row]:
        """`state.read_log`."""
        page, size = [], 0
        for row in self.events.get((tenant_id, run_id), [])[after_seq : after_seq + item_max]:
            if size >= byte_max:
                break
            page.append(row)
            size += len(row["event"])
        return page


class _Batch:
    """The arguments of `state.append` by name."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        (
            self.tenants, self.runs, self.append_ids, self.expected_seqs, self.epochs,
            self.from_states, self.to_states, self.progresses,
            self.event_firsts, self.event_lasts, self.types, self.events, self.event_time,
            self.create_count, self.users, self.session_ids, self.policies, self.agents, self.versions,
            self.run_inputs, self.keys, self.hashes, self.executors, self.deadlines, self.traces,
            self.end_first, self.results, self.errors, self.all_stages, self.usages,
            self.consumed_items, self.consumed_requests, self.interrupt_payload,
        ) = arguments  # fmt: skip


def _miss(row: Row, i: int, reason: str, *, run: Row) -> None:
    row["missed"].append(i + 1)
    row["missed_reasons"].append(reason)
    row["missed_runs"].append(run["run_id"])
    row["missed_states"].append(run.get("state", 0))
    row["missed_seqs"].append(run.get("last_seq", 0))
    row["missed_ordinals"].append(run.get("ordinal", 0))
