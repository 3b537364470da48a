"""What a URL asks: every parameter is known, of its type and within its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mainspring.v1 import registry_pb2, state_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason, Violation

WAIT_SECONDS_MAX: Final = 300

_PAGE_SIZE_MAX: Final = 500
_EVENTS_PAGE_SIZE_MAX: Final = 1_000
_STATE_PREFIX: Final = "RUN_STATE_"

# The parameters of a query: each name with all its values.
Query = Mapping[str, list[str]]


def list_runs_request(query: Query) -> state_pb2.ListRunsRequest:
    """`page_size`, `page_token`, `session_id`, `agent`, `parent_run_id`, and `state` any number of times."""
    _refuse_unknown(query, ("page_size", "page_token", "session_id", "agent", "parent_run_id", "state"))
    return state_pb2.ListRunsRequest(
        page_size=_whole(query, "page_size", most=_PAGE_SIZE_MAX),
        page_token=_single(query, "page_token"),
        session_id=_single(query, "session_id"),
        agent=_single(query, "agent"),
        parent_run_id=_single(query, "parent_run_id"),
        states=[_state(name) for name in query.get("state", ())],
    )


def list_sessions_request(query: Query) -> state_pb2.ListSessionsRequest:
    """`page_size` and `page_token`."""
    _refuse_unknown(query, ("page_size", "page_token"))
    return state_pb2.ListSessionsRequest(
        page_size=_whole(query, "page_size", most=_PAGE_SIZE_MAX), page_token=_single(query, "page_token")
    )


def list_approvals_request(query: Query) -> state_pb2.ListApprovalsRequest:
    """`page_size`, `page_token`, `run_id`, and `include_resolved=true`."""
    _refuse_unknown(query, ("page_size", "page_token", "run_id", "include_resolved"))
    include_resolved = _single(query, "include_resolved") or "false"
    if include_resolved not in ("true", "false"):
        raise _invalid("include_resolved", "must be true or false")
    return state_pb2.ListApprovalsRequest(
        page_size=_whole(query, "page_size", most=_PAGE_SIZE_MAX),
        page_token=_single(query, "page_token"),
        run_id=_single(query, "run_id"),
        include_resolved=include_resolved == "true",
    )


def list_run_metrics_request(query: Query) -> state_pb2.ListRunMetricsRequest:
    """`page_size`, `page_token`, `agent`, `run_id`, and `since`, a time as RFC 3339 writes it."""
    _refuse_unknown(query, ("page_size", "page_token", "agent", "run_id", "since"))
    request = state_pb2.ListRunMetricsRequest(
        page_size=_whole(query, "page_size", most=_PAGE_SIZE_MAX),
        page_token=_single(query, "page_token"),
        agent=_single(query, "agent"),
        run_id=_single(query, "run_id"),
    )
    if since := _single(query, "since"):
        try:
            request.since.FromJsonString(since)
        except ValueError as error:
            raise _invalid("since", "must be a time as RFC 3339 writes it, such as 2026-11-24T03:06:12Z") from error
    return request


def list_tools_request(query: Query) -> registry_pb2.ListToolsRequest:
    """`page_size` and `page_token`."""
    _refuse_unknown(query, ("page_size", "page_token"))
    return registry_pb2.ListToolsRequest(
        page_size=_whole(query, "page_size", most=_PAGE_SIZE_MAX), page_token=_single(query, "page_token")
    )


def list_agents_request(query: Query) -> registry_pb2.ListAgentsRequest:
    """`page_size`, `page_token`, `capability`, `text`, and `label=name:value` any number of times."""
    _refuse_unknown(query, ("page_size", "page_token", "capability", "text", "label"))
    labels = {}
    for label in query.get("label", ()):
        name, separator, value = label.partition(":")
        if not separator:
            raise _invalid("label", "must be name:value")
        labels[name] = value
    return registry_pb2.ListAgentsRequest(
        page_size=_whole(query, "page_size", most=_PAGE_SIZE_MAX),
        page_token=_single(query, "page_token"),
        capability=_single(query, "capability"),
        text=_single(query, "text"),
        labels=labels,
    )


def list_schedules_request(query: Query) -> registry_pb2.ListSchedulesRequest:
    """`page_size` and `page_token`."""
    _refuse_unknown(query, ("page_size", "page_token"))
    return registry_pb2.ListSchedulesRequest(
        page_size=_whole(query, "page_size", most=_PAGE_SIZE_MAX), page_token=_single(query, "page_token")
    )


def read_events_range(query: Query) -> tuple[int, int]:
    """`after_seq` and `page_size` of a page of events."""
    _refuse_unknown(query, ("after_seq", "page_size"))
    return _whole(query, "after_seq"), _whole(query, "page_size", most=_EVENTS_PAGE_SIZE_MAX)


def wait_seconds(query: Query) -> int:
    """`wait`: how long a start waits for the end of its run."""
    _refuse_unknown(query, ("wait",))
    return _whole(query, "wait", most=WAIT_SECONDS_MAX)


def agent_version(query: Query) -> str:
    """`version` of an agent; empty: the newest."""
    _refuse_unknown(query, ("version",))
    return _single(query, "version")


def whole_number(text: str, name: str, *, most: int = (1 << 63) - 1) -> int:
    """A parameter or header that is a whole number, 0 or more."""
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) > most:
        raise _invalid(name, f"must be a whole number from 0 to {most}")
    return int(text)


def _whole(query: Query, name: str, *, most: int = (1 << 63) - 1) -> int:
    return whole_number(_single(query, name) or "0", name, most=most)


def _single(query: Query, name: str) -> str:
    values = query.get(name, [])
    if len(values) > 1:
        raise _invalid(name, "may be given once")
    return values[0] if values else ""


def _state(name: str) -> types_pb2.RunState.ValueType:
    try:
        return types_pb2.RunState.Value(_STATE_PREFIX + name.upper())
    except ValueError as error:
        known = ", ".join(known.removeprefix(_STATE_PREFIX) for known in types_pb2.RunState.keys()[1:])
        raise _invalid("state", f"must be one of {known}") from error


def _refuse_unknown(query: Query, known: tuple[str, ...]) -> None:
    for name in query:
        if name not in known:
            raise _invalid(name[:64], f"is not a parameter of this; they are {', '.join(known)}")


def _invalid(field: str, description: str) -> MainspringError:
    return MainspringError(
        Reason.REQUEST_INVALID,
        f"The parameter {field} {description}.",
        violations=[Violation(field, description)],
        field=field,
    )
