"""The part of the model of the database that holds what is asked of runs, and who may take them up. See `tables`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

# Any: a row is what its table's columns are.
Row = dict[str, Any]
Key = tuple[str, str]

QUEUED, RUNNING, WAITING, PAUSED, FIRST_ENDED = 1, 2, 3, 4, 5
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# What the holder's clock may be ahead of the database's when it says that an approval has expired.
EXPIRY_TOLERANCE_SECONDS: Final = 1.0


def moment_of(seconds: float) -> datetime:
    """Seconds since 1970 as the database gives them."""
    return EPOCH + timedelta(microseconds=int(seconds * 1e6))


class Asking:
    """Runs, their leases and claimables, and what is asked of them. `now`: the database's clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.runs: dict[Key, Row] = {}
        self.leases: dict[Key, Row] = {}
        self.ready: dict[Key, float] = {}
        self.inputs: dict[Key, dict[str, Row]] = {}
        self.approvals: dict[Key, dict[int, Row]] = {}
        self.on_release: Callable[[Key, int], None] = lambda key, epoch: None

    def wakes(self, state: int, kind: str) -> bool:
        """`state.wakes`."""
        if state == QUEUED:
            return kind == "cancel"
        return state != PAUSED or kind in ("cancel", "resume")

    def unconsumed(self, key: Key) -> list[Row]:
        """What a run has not taken, in the order in which it came."""
        return [row for row in self.inputs.get(key, {}).values() if row["consumed_seq"] is None]

    def put_input(
        self, tenant_id: str, user_id: str, run_id: str, request_id: str, asked_by: str, kind: str, payload: bytes,
        kind_max: int, approval_seq: int, decision: int, data: bytes, answer_roles: Sequence[str], is_holder: bool,
    ) -> Row | None:  # fmt: skip
        """`state.ask`."""
        key = (tenant_id, run_id)
        run = self.runs.get(key)
        if run is None:
            return None
        is_own = run["user_id"] == user_id
        approval = self.approvals.get(key, {}).get(approval_seq) if kind == "approval" else None
        if kind == "approval" and (approval is None or not (is_own or approval["role"] in answer_roles)):
            return None
        if kind != "approval" and not is_own:
            return None
        stored, holder = self.inputs.get(key, {}).get(request_id), None
        if stored is not None:
            reason = "" if stored["kind"] == kind and stored["requested_by"] == asked_by else "reused"
        else:
            reason = self._refusal(
                key, kind=kind, kind_max=kind_max, approval=approval, is_holder=is_holder,
                may_answer=approval is not None
                and (approval["role"] in answer_roles or (approval["role"] == "runner" and is_own)),
            )  # fmt: skip
        if stored is None and not reason:
            stored = self.ask(key, request_id=request_id, requested_by=asked_by, kind=kind, payload=payload)
            if approval is not None:
                approval |= {"decision": decision, "data": data, "answered_by": "" if is_holder else asked_by}
            holder = self.tell_or_wake(key, kind)
        of_approval = {name: (approval or {}).get(name) for name in ("decision", "answered_by", "expires_time", "role")}
        row: Row = {"payload": None} if stored is None else stored
        return {"reason": reason, "state": run["state"], "holder": holder, **row, **of_approval}

    def _refusal(
        self, key: Key, *, kind: str, kind_max: int, approval: Row | None, is_holder: bool, may_answer: bool
    ) -> str:
        state, waiting = self.runs[key]["state"], self.unconsumed(key)
        if state >= FIRST_ENDED:
            return "ended"
        if approval is not None:
            if not is_holder and not may_answer:
                return "role"
            if approval["decision"]:
                return "resolved"
            expires = float("inf") if approval["expires_time"] is None else approval["expires_time"].timestamp()
            if is_holder and expires > self.now() + EXPIRY_TOLERANCE_SECONDS:
                return "early"
            if not is_holder and expires <= self.now():
                return "expired"
        switches = [row["kind"] == "pause" for row in waiting if row["kind"] in ("pause", "resume")]
        is_paused = switches[-1] if switches else state == PAUSED
        if (kind == "pause" and is_paused) or (kind == "resume" and not is_paused):
            return "illegal"
        return "full" if sum(row["kind"] == kind for row in waiting) >= kind_max else ""

    def ask(self, key: Key, *, request_id: str, requested_by: str, kind: str, payload: bytes) -> Row | None:
        """A new input, None if the request made it before."""
        inputs = self.inputs.setdefault(key, {})
        if request_id in inputs:
            return None
        inputs[request_id] = {
            "tenant_id": key[0],
            "run_id": key[1],
            "request_id": request_id,
            "requested_by": requested_by,
            "kind": kind,
            "payload": payload,
            "create_time": moment_of(self.now()),
            "consumed_seq": None,
        }
        return inputs[request_id]

    def tell_or_wake(self, key: Key, kind: str) -> str | None:
        """Who is told of an input; the run becomes claimable where that is nobody and the input wakes it."""
        lease = self.leases.get(key)
        if lease is not None:
            return str(lease["executor_id"])
        if self.wakes(self.runs[key]["state"], kind):
            self.make_ready(key)
        return None

    def make_ready(self, key: Key, moment: float | None = None) -> None:
        """The run is claimable from now or a moment on, or from before."""
        due = self.now() if moment is None else moment
        self.ready[key] = min(self.ready.get(key, due), due)

    def release(self, key: Key, due: datetime | None) -> bool:
        """The holder lets go; whether the run is claimable at once."""
        run = self.runs[key]
        moments = [moment.timestamp() for moment in (due, run["deadline"]) if moment is not None]
        if any(self.wakes(run["state"], row["kind"]) for row in self.unconsumed(key)):
            moments = [self.now()]
        self.leases.pop(key, None)
        self.on_release(key, run["epoch"])
        if moments:
            self.make_ready(key, min(moments))
        return bool(moments) and min(moments) <= self.now()

    def inputs_of(self, tenants: Sequence[str], run_ids: Sequence[str]) -> list[Row]:
        """`state.inputs_of`."""
        return [row for key in zip(tenants, run_ids, strict=True) for row in self.unconsumed(key)]

    def inputs_for(self, executor_ids: Sequence[str], item_max: int) -> list[Row]:
        """`state.inputs_for`."""
        found = []
        for key in self.inputs:
            lease = self.leases.get(key)
            if lease is not None and lease["executor_id"] in executor_ids:
                found += [row | {"executor_id": lease["executor_id"]} for row in self.unconsumed(key)]
        return found[:item_max]
