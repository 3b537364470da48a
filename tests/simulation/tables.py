"""A small model of the database of state: what its functions do to its tables, one statement at a time.

`tests/contract/test_state_machine.py` binds it to the real thing. It is written item by item, where the migration works
on sets; a rule that a test wants to break is a method of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from tests.simulation.asking import FIRST_ENDED, PAUSED, QUEUED, RUNNING, WAITING, Key, Row, moment_of
from tests.simulation.batch import Batch
from tests.simulation.lining import PARALLEL, Lining

ENQUEUE, REJECT, INTERRUPT = 1, 2, 3
PEER_SECONDS: Final = 5.0
_TOLD: Final = ("holders", "tenants", "users", "runs", "requests", "payloads")


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


def sub_run_ended(sub_run_id: str, call_id: str, state: int) -> bytes:
    """`state.sub_run_ended`."""
    call = call_id.encode()
    fields = b"\x0a\x24" + sub_run_id.encode() + b"\x12" + varint(len(call)) + call + b"\x18" + varint(state)
    return b"\x7a" + varint(len(fields)) + fields


class Tables(Lining):
    """The schema `state`. `now`: the database's clock in seconds; `on_commit` sees each run's new events."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(now)
        self.on_commit: Callable[[Key, list[Row], int], None] = lambda key, events, epoch: None
        self.on_grant: Callable[[Key, int, str], None] = lambda key, epoch, executor_id: None
        self.events: dict[Key, list[Row]] = {}
        self.keys: dict[tuple[str, str, str], tuple[str, bytes]] = {}
        self.executors: dict[tuple[str, str], list[float]] = {}
        self.processes: dict[str, float] = {}
        self.metrics: dict[Key, Row] = {}
        self.webhooks: dict[Key, tuple[str, str]] = {}

    def append(self, *arguments: Any) -> Row:
        """`state.append_batch`."""
        batch = Batch(arguments)
        row: Row = {name: [] for name in ("made", "made_running", "made_ordinals")}
        row |= {f"hit{part}": [] for part in ("", "_users", "_ordinals", "_states")}
        row |= {f"missed{part}": [] for part in ("", "_reasons", "_runs", "_states", "_seqs", "_ordinals")}
        row |= {f"told_{part}": [] for part in _TOLD}
        row["became_ready"] = False
        moved: list[tuple[str, str, str]] = []
        standing: list[int] = []
        counts: Counter[tuple[str, str]] = Counter()
        for i in range(batch.create_count):
            self._create(batch, i, row=row, standing=standing, counts=counts)
        for i in range(batch.create_count, len(batch.runs)):
            self._advance(batch, i, row=row, moved=moved)
        self._follow_up(batch, row)
        nexts = [self.move_session(session_key) for session_key in moved]
        for i in row["hit"]:
            key = (batch.tenants[i - 1], batch.runs[i - 1])
            run = self.runs[key]
            is_released = i in batch.release_items and run["state"] in (WAITING, PAUSED)
            if run["caps"] and (run["state"] >= FIRST_ENDED or is_released):
                self.free_slots(key)
                if run["state"] >= FIRST_ENDED:
                    self.forget_ready(key)
        for next_key in nexts:
            if next_key is not None:
                led = self.lead_on(next_key, may_begin=False, waits_first=True)
                row["became_ready"] |= led == "lined"
        for tenant_id in batch.tenants:
            row["became_ready"] |= self.give_slots(tenant_id)
        for i in standing:
            row["became_ready"] |= self.set_caps(batch.tenants[i], batch.caps_of(i))
        for i in standing:
            self._begin(batch, i, row)
        return row

    def _begin(self, batch: Batch, i: int, row: Row) -> None:
        """A create that stands in no session's line any more goes on to others, or begins."""
        key = (batch.tenants[i], batch.runs[i])
        led = self.lead_on(key, may_begin=not batch.is_queue_only(i))
        row["became_ready"] |= led == "lined"
        if led == "begins":
            run = self.runs[key]
            run |= {"state": RUNNING, "last_seq": 1, "start_time": moment_of(self.now())}
            self.forget_ready(key)
            self.count(key[0], -1)
            self._lease(key, 1, batch.executors[i])
            self._log(batch, i, user_id=run["user_id"], ordinal=run["ordinal"])
            row["made_running"][row["made"].index(i + 1)] = True

    def _follow_up(self, batch: Batch, row: Row) -> None:
        """What a set of appends does behind all of them."""
        hit = [(i, (batch.tenants[i - 1], batch.runs[i - 1])) for i in row["hit"]]
        for i, key in hit:
            for k in _places(batch.ask_items, i):
                self.approvals.setdefault(key, {})[batch.ask_seqs[k]] = batch.asked(k)
            for k in _places(batch.resolve_items, i):
                approval = self.approvals.get(key, {}).get(batch.resolve_seqs[k])
                if approval is not None and not approval["decision"]:
                    approval |= batch.resolved(k)
        for _, key in hit:
            if self.runs[key]["state"] >= FIRST_ENDED:
                self._tell_parent(self.runs[key], row)
        for i, key in hit:
            for k in _places(batch.release_items, i):
                row["became_ready"] |= self.release(key, batch.release_dues[k])

    def _tell_parent(self, run: Row, row: Row) -> None:
        key = (run["tenant_id"], run["parent_run_id"] or "")
        parent = self.runs.get(key)
        if parent is None or parent["state"] >= FIRST_ENDED:
            return
        payload = sub_run_ended(run["run_id"], run["parent_call_id"], run["state"])
        user_id = parent["user_id"]
        if self.ask(key, request_id=run["run_id"], requested_by=user_id, kind="sub_run_ended", payload=payload) is None:
            return
        holder = self.tell_or_wake(key, "sub_run_ended")
        if holder is None:
            row["became_ready"] |= self.wakes(parent["state"], "sub_run_ended")
            return
        for part, value in zip(_TOLD, (holder, key[0], user_id, key[1], run["run_id"], payload), strict=True):
            row[f"told_{part}"].append(value)

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

    def _create(self, batch: Batch, i: int, *, row: Row, standing: list[int], counts: Counter[tuple[str, str]]) -> None:
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
        if i >= batch.root_count:
            self._create_sub_run(batch, i, row)
            return
        session_key = (tenant_id, user_id, session_id)
        if self.overflows(batch, i, counts):
            _miss(row, i, "backlog", run={"run_id": run_id})
            return
        session = self.sessions.get(session_key)
        if session is None:
            session = self.sessions[session_key] = self.make_session(session_key, policy)
        elif session["policy"] == REJECT and session["head_run_id"] is not None:
            _miss(row, i, "busy", run={"run_id": run_id})
            return
        has_turn = session["policy"] == PARALLEL or session["head_run_id"] is None
        is_running = has_turn and not batch.stands_in_line(i)
        session["run_count"] += 1
        session["last_run_id"] = run_id
        if session["policy"] != PARALLEL:
            session["head_run_id"] = session["head_run_id"] or run_id
            session["waiting"] += not has_turn
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
        self.count(tenant_id, 1, weight=(batch.weights[i] if batch.weights else 0) or 1)
        if batch.deadlines[i] is not None:
            self.ready[key] = batch.deadlines[i].timestamp()
        if has_turn:
            standing.append(i)
            return
        self.queued.setdefault(session_key, {})[ordinal] = run_id
        if session["policy"] == INTERRUPT:
            head = (tenant_id, session["head_run_id"])
            self.ask(head, request_id=run_id, requested_by=user_id, kind="cancel", payload=batch.interrupt_payload)
            self.make_ready(head)
            row["became_ready"] = True

    def _create_sub_run(self, batch: Batch, i: int, row: Row) -> None:
        key, k = (batch.tenants[i], batch.runs[i]), i - batch.root_count
        parent = self.runs.get((key[0], batch.parents[k]))
        if parent is None or parent["user_id"] != batch.users[i] or parent["state"] >= FIRST_ENDED:
            is_known = parent is not None and parent["user_id"] == batch.users[i]
            state = parent["state"] if parent is not None and is_known else 0
            _miss(row, i, "ended" if is_known else "unknown", run={"run_id": batch.parents[k], "state": state})
            return
        self.runs[key] = self._make_run(batch, i, ordinal=0, is_running=True) | {
            "parent_run_id": batch.parents[k],
            "root_run_id": batch.roots[k],
            "parent_call_id": batch.parent_calls[k],
            "depth": batch.depths[k],
        }
        for name, value in (("made", i + 1), ("made_running", True), ("made_ordinals", 0)):
            row[name].append(value)
        self._lease(key, 1, batch.executors[i])
        self._log(batch, i, user_id=batch.users[i], ordinal=0)

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

    def _make_run(self, batch: Batch, i: int, *, ordinal: int, is_running: bool) -> Row:
        moment = moment_of(self.now())
        names = ("end_time", "released_time", "result", "error", "stages", "usage")
        empty = dict.fromkeys((*names, "parent_run_id", "root_run_id", "parent_call_id"))
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
            "depth": 0,
            "source_run_id": batch.sources[i] if batch.sources else None,
            "source_seq": (batch.source_seqs[i] if batch.source_seqs else None) or 0,
            "attempt": (batch.attempts[i] if batch.attempts else None) or 1,
            "priority": (batch.priorities[i] if batch.priorities else None) or 0,
            "due_time": batch.due(i),
            "caps": batch.caps_of(i),
            "webhook": (batch.hook_urls[i], batch.hook_credentials[i]) if batch.hook_urls else (None, None),
        }

    def _advance(self, batch: Batch, i: int, *, row: Row, moved: list[tuple[str, str, str]]) -> None:
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
        run["state"] = batch.to_states[i] or run["state"]
        run["stalled"] = 0 if batch.progresses[i] else run["stalled"]
        if seq == 0 and not is_end and run["last_seq"] > 0:
            run["start_time"] = moment
        if seq == 0 and run["last_seq"] > 0 and run["ordinal"] > 0:
            self.count(key[0], -1)
        self._log(batch, i, user_id=run["user_id"], ordinal=run["ordinal"])
        for consumed, request_id in zip(batch.consumed_items, batch.consumed_requests, strict=True):
            asked = self.inputs.get(key, {}).get(request_id) if consumed == i + 1 else None
            if asked is not None and asked["consumed_seq"] is None:
                asked["consumed_seq"] = run["last_seq"]
        row["hit"].append(i + 1)
        row["hit_users"].append(run["user_id"])
        row["hit_ordinals"].append(run["ordinal"])
        row["hit_states"].append(run["state"])
        if is_end:
            ending = i + 1 - batch.end_first
            run["end_time"] = run["released_time"] = moment
            run["result"], run["error"] = batch.results[ending], batch.errors[ending]
            run["stages"], run["usage"] = batch.all_stages[ending], batch.usages[ending]
            self.leases.pop(key, None)
            self.metrics[key] = {"state": run["state"]} | {name: row[ending] for name, row in batch.counted()}
            if run["webhook"][0] is not None:
                self.webhooks[key] = run["webhook"]
            self.leave_session(run, moved=moved, was_started=was_started)

    def _log(self, batch: Batch, i: int, *, user_id: str, ordinal: int) -> None:
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
        lease = dict.fromkeys(("claim_seq", "claim_state_id")) | {"handed_back": False}
        lease |= {"executor_id": executor_id, "create_time": self.now()}
        self.leases[key] = lease
        self.on_grant(key, epoch, executor_id)

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


def _places(items: Sequence[int], i: int) -> list[int]:
    return [k for k, item in enumerate(items) if item == i]


def _miss(row: Row, i: int, reason: str, *, run: Row) -> None:
    row["missed"].append(i + 1)
    row["missed_reasons"].append(reason)
    row["missed_runs"].append(run["run_id"])
    row["missed_states"].append(run.get("state", 0))
    row["missed_seqs"].append(run.get("last_seq", 0))
    row["missed_ordinals"].append(run.get("ordinal", 0))
