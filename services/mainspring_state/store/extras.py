"""What few appends of a batch have, as arguments of the statement: empty where none has it, to cost nothing then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import state_pb2, types_pb2

from mainspring_state.core.append import Entry
from mainspring_state.core.approvals import ROLES, read_id
from mainspring_state.core.refusals import BACKLOG_DEFAULT
from mainspring_state.store.rows import to_datetime

# Any in this module: each argument has the type of its parameter in the migration.

_OF_APPROVALS: Final = frozenset({"approval_requested", "approval_resolved"})


def of_creates(creates: Sequence[state_pb2.CreateRun]) -> list[Any]:
    """Sub-runs, which come last; sources, attempts, priorities; who is told of the end."""
    subs = [create for create in creates if create.parent_run_id]
    hooks = [create.webhook if create.HasField("webhook") else None for create in creates]
    has_hook = any(hook is not None for hook in hooks)
    return [
        len(creates) - len(subs),
        [create.parent_run_id for create in subs],
        [create.root_run_id for create in subs],
        [create.parent_call_id for create in subs],
        [create.depth for create in subs],
        _unless_empty([create.source_run_id or None for create in creates]),
        _unless_empty([create.source_seq or None for create in creates]),
        _unless_empty([create.attempt or None for create in creates]),
        _unless_empty([create.priority or None for create in creates]),
        [None if hook is None else hook.url for hook in hooks] if has_hook else [],
        [None if hook is None else hook.credential for hook in hooks] if has_hook else [],
    ]


def of_releases(appends: Sequence[state_pb2.Append]) -> list[Any]:
    """Whose holder lets go, and until when."""
    released = [i for i, append in enumerate(appends, 1) if append.HasField("release")]
    dues = [appends[i - 1].release for i in released]
    return [released, [to_datetime(due.due_time) if due.HasField("due_time") else None for due in dues]]


def of_metrics(metrics: Sequence[types_pb2.RunMetrics]) -> list[Any]:
    """What only the holder can count, of each run that ends."""
    return [
        [row.model_calls for row in metrics],
        [row.tool_calls for row in metrics],
        [row.tool_errors for row in metrics],
        [row.cache_hits for row in metrics],
        [row.retries for row in metrics],
        [row.waiting_ms for row in metrics],
    ]


def of_approvals(entries: Sequence[Entry]) -> list[Any]:
    """Approvals that are asked for, and those that are over."""
    asked, resolved = [], []
    for i, entry in enumerate(entries, 1):
        if _OF_APPROVALS.isdisjoint(entry.types):
            continue
        for place, name in enumerate(entry.types):
            if name == "approval_requested":
                event = entry.append.events[place]
                asked.append((i, event.seq, event.approval_requested))
            elif name == "approval_resolved":
                resolved.append((i, entry.append.events[place].approval_resolved))
    return [
        [i for i, _, _ in asked],
        [seq for _, seq, _ in asked],
        [request.kind for _, _, request in asked],
        [request.role or ROLES[0] for _, _, request in asked],
        [request.title for _, _, request in asked],
        [request.call_id for _, _, request in asked],
        [request.arguments for _, _, request in asked],
        [request.answer_schema for _, _, request in asked],
        [to_datetime(request.expires_time) if request.HasField("expires_time") else None for _, _, request in asked],
        [i for i, _ in resolved],
        [(read_id(answer.approval_id) or ("", 0))[1] for _, answer in resolved],
        [answer.decision for _, answer in resolved],
        [answer.by for _, answer in resolved],
        [answer.data for _, answer in resolved],
    ]


def of_lines(creates: Sequence[state_pb2.CreateRun], moment: Timestamp) -> list[Any]:
    """Who stands in which line before it may begin: for its time, for slots, for an executor; the backlog's bound."""
    now = (moment.seconds, moment.nanos)
    times = [create.due_time for create in creates]
    dues = [time if (time.seconds, time.nanos) > now else None for time in times]
    stands = [
        create.queue_only or bool(create.caps) or due is not None for create, due in zip(creates, dues, strict=True)
    ]
    backlogs = [create.backlog_max or BACKLOG_DEFAULT for create in creates]
    caps = [(i, cap) for i, create in enumerate(creates, 1) for cap in create.caps]
    return [
        stands if any(stands) else [],
        [create.queue_only for create in creates] if any(create.queue_only for create in creates) else [],
        _unless_empty([None if due is None else to_datetime(due) for due in dues]),
        _unless_empty([create.weight or None for create in creates]),
        backlogs,
        min(backlogs, default=BACKLOG_DEFAULT),
        [i for i, _ in caps],
        [cap.scope for _, cap in caps],
        [cap.limit for _, cap in caps],
    ]


def _unless_empty(column: list[Any]) -> list[Any]:
    return column if any(value is not None for value in column) else []
