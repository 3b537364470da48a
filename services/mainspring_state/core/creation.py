"""Which creates are legal: what a run is made of, before anything of it is known."""

from __future__ import annotations

import re
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import state_pb2, types_pb2

from mainspring_state.core.refusals import EVENT_BYTES_MAX, invalid, too_large

ID_CHARACTERS_MAX: Final = 128
DEPTH_MAX: Final = 10
PRIORITY_MAX: Final = 100
WEIGHT_MAX: Final = 1_000
CAPS_MAX: Final = 8
SCOPE_CHARACTERS_MAX: Final = 300
URL_CHARACTERS_MAX: Final = 2_000

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# The last second of the year 9999, where calendars of databases and languages still agree.
_SECONDS_MAX: Final = 253_402_300_799
_POLICIES: Final = frozenset(types_pb2.SessionPolicy.values())
# What a column keeps as text.
_TEXTS: Final = (
    "user_id", "session_id", "idempotency_key", "agent", "agent_version", "executor_id", "trace_id", "parent_call_id",
)  # fmt: skip


def is_uuid(text: str) -> bool:
    """Whether a text is a UUID in its one canonical form, as all run ids are."""
    return _UUID.fullmatch(text) is not None


def is_moment(moment: Timestamp) -> bool:
    """Whether databases and languages agree on it."""
    return 0 <= moment.seconds <= _SECONDS_MAX and 0 <= moment.nanos < 1_000_000_000


def check_create(append: state_pb2.Append, types: tuple[str, ...]) -> None:
    """Refuses a create that no run can be made of."""
    create = append.create
    if types != ("agent_started",) or append.expected_seq != 0 or append.epoch != 1:
        raise invalid(append, "create", detail="a create has exactly agent_started, expected_seq 0 and epoch 1")
    for field in ("user_id", "session_id", "executor_id"):
        if not 1 <= len(getattr(create, field)) <= ID_CHARACTERS_MAX:
            raise invalid(append, f"create.{field}", detail=f"it has 1 to {ID_CHARACTERS_MAX} characters")
    # One value that no column holds would have the whole batch committed in halves.
    for field in _TEXTS:
        if "\x00" in getattr(create, field):
            raise invalid(append, f"create.{field}", detail="it holds a NUL character")
    if create.policy not in _POLICIES:
        raise invalid(append, "create.policy", detail="it is none that this release knows")
    if len(create.idempotency_key) > ID_CHARACTERS_MAX:
        raise invalid(append, "create.idempotency_key", detail=f"it has at most {ID_CHARACTERS_MAX} characters")
    if not is_moment(create.deadline):
        raise invalid(append, "create.deadline", detail="it is before 1970 or after 9999")
    if len(create.input) > EVENT_BYTES_MAX:
        raise too_large("create.input", len(create.input))
    if create.source_run_id and not is_uuid(create.source_run_id):
        raise invalid(append, "create.source_run_id", detail="it is not a UUID")
    if create.source_seq < 0:
        raise invalid(append, "create.source_seq", detail="events count from 1")
    if create.attempt < 0:
        raise invalid(append, "create.attempt", detail="attempts count from 1")
    if abs(create.priority) > PRIORITY_MAX:
        raise invalid(append, "create.priority", detail=f"it is -{PRIORITY_MAX} to {PRIORITY_MAX}")
    if not is_moment(create.due_time):
        raise invalid(append, "create.due_time", detail="it is before 1970 or after 9999")
    if not 0 <= create.weight <= WEIGHT_MAX:
        raise invalid(append, "create.weight", detail=f"it is 1 to {WEIGHT_MAX}, 0: 1")
    if create.backlog_max < 0:
        raise invalid(append, "create.backlog_max", detail="it counts from 1, 0: as by default")
    if create.caps:
        _check_caps(append)
    if create.HasField("webhook"):
        _check_webhook(append)
    if create.parent_run_id or create.depth:
        _check_sub_run(append)


def _check_caps(append: state_pb2.Append) -> None:
    caps = append.create.caps
    if len(caps) > CAPS_MAX or len({cap.scope for cap in caps}) < len(caps):
        raise invalid(append, "create.caps", detail=f"there are at most {CAPS_MAX}, each of a scope of its own")
    for cap in caps:
        if not 1 <= len(cap.scope) <= SCOPE_CHARACTERS_MAX or "\x00" in cap.scope:
            raise invalid(append, "create.caps.scope", detail=f"it has 1 to {SCOPE_CHARACTERS_MAX} characters")
        if cap.limit < 1:
            raise invalid(append, "create.caps.limit", detail="it counts from 1")


def _check_webhook(append: state_pb2.Append) -> None:
    webhook = append.create.webhook
    if not 1 <= len(webhook.url) <= URL_CHARACTERS_MAX or "\x00" in webhook.url:
        raise invalid(append, "create.webhook.url", detail=f"it has 1 to {URL_CHARACTERS_MAX} characters")
    if len(webhook.credential) > ID_CHARACTERS_MAX or "\x00" in webhook.credential:
        raise invalid(append, "create.webhook.credential", detail=f"it has at most {ID_CHARACTERS_MAX} characters")


def _check_sub_run(append: state_pb2.Append) -> None:
    create = append.create
    for field in ("parent_run_id", "root_run_id"):
        if not is_uuid(getattr(create, field)):
            raise invalid(append, f"create.{field}", detail="it is not a UUID")
    if create.parent_run_id == append.run_id:
        raise invalid(append, "create.parent_run_id", detail="it is the run itself")
    if not 1 <= create.depth <= DEPTH_MAX:
        raise invalid(append, "create.depth", detail=f"it is 1 to {DEPTH_MAX}")
    if not 1 <= len(create.parent_call_id) <= ID_CHARACTERS_MAX:
        raise invalid(append, "create.parent_call_id", detail=f"it has 1 to {ID_CHARACTERS_MAX} characters")
    if create.idempotency_key:
        raise invalid(append, "create.idempotency_key", detail="a sub-run has none: its run id is made once")
    if create.caps or create.queue_only or create.HasField("due_time"):
        raise invalid(append, "create", detail="a sub-run stands in no line: no caps, no due_time, no queue_only")
