"""How rows of the schema `state` become messages, and as whom they are read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg
import orjson
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit import postgres
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import UserExecutionContext

# Any: what a column holds; its type is the migration's to say.
Row = Mapping[str, Any] | asyncpg.Record

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def to_timestamp(moment: datetime | None) -> Timestamp | None:
    """The moment as a message, exact to the microsecond; None stays unset."""
    if moment is None:
        return None
    since = moment - _EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1_000)


def to_datetime(moment: Timestamp) -> datetime:
    """The message as a moment, exact to the microsecond."""
    return datetime.fromtimestamp(moment.seconds, UTC).replace(microsecond=moment.nanos // 1_000)


def to_run(row: Row) -> types_pb2.Run:
    """A row of `runs`."""
    run_id = str(row["run_id"])
    return types_pb2.Run(
        run_id=run_id,
        tenant_id=row["tenant_id"],
        user_id=row["user_id"],
        session_id=row["session_id"],
        ordinal=row["ordinal"],
        agent=row["agent"],
        agent_version=row["agent_version"],
        state=row["state"],
        last_seq=row["last_seq"],
        input=row["input"],
        result=row["result"],
        error=_of_json(row["error"], types_pb2.RunError),
        create_time=to_timestamp(row["create_time"]),
        start_time=to_timestamp(row["start_time"]),
        end_time=to_timestamp(row["end_time"]),
        released_time=to_timestamp(row["released_time"]),
        deadline=to_timestamp(row["deadline"]),
        stages=_stages(row),
        trace_id=row["trace_id"],
        epoch=row["epoch"],
        parent_run_id=str(row["parent_run_id"] or ""),
        root_run_id=str(row["root_run_id"] or run_id),
        usage=_of_json(row["usage"], types_pb2.Usage),
        depth=row["depth"],
        source_run_id=str(row["source_run_id"] or ""),
        source_seq=row["source_seq"],
        attempt=row["attempt"],
        priority=row["priority"],
    )


def to_session(row: Row) -> types_pb2.Session:
    """A row of `sessions`."""
    return types_pb2.Session(
        session_id=row["session_id"],
        tenant_id=row["tenant_id"],
        user_id=row["user_id"],
        policy=row["policy"],
        title=row["title"],
        create_time=to_timestamp(row["create_time"]),
        update_time=to_timestamp(row["update_time"]),
        run_count=row["run_count"],
    )


def to_input(row: Row) -> state_pb2.RunInput:
    """A row of `inputs`."""
    run_input = state_pb2.RunInput.FromString(row["payload"])
    run_input.request_id = row["request_id"]
    run_input.tenant_id = row["tenant_id"]
    run_input.run_id = str(row["run_id"])
    run_input.requested_by = row["requested_by"]
    run_input.create_time.CopyFrom(to_timestamp(row["create_time"]) or Timestamp())
    return run_input


def to_approval(row: Row) -> types_pb2.Approval:
    """A row of `approvals`."""
    run_id = str(row["run_id"])
    return types_pb2.Approval(
        approval_id=f"{run_id}.{row['seq']}",
        run_id=run_id,
        tenant_id=row["tenant_id"],
        user_id=row["user_id"],
        session_id=row["session_id"],
        agent=row["agent"],
        title=row["title"],
        arguments=row["arguments"],
        answer_schema=row["answer_schema"],
        role=row["role"],
        kind=row["kind"],
        create_time=to_timestamp(row["create_time"]),
        expires_time=to_timestamp(row["expires_time"]),
        decision=row["decision"],
        data=row["data"],
        answered_by=row["answered_by"],
        resolve_time=to_timestamp(row["resolve_time"]),
    )


def to_metrics(row: Row) -> types_pb2.RunMetrics:
    """A row of `run_metrics`."""
    return types_pb2.RunMetrics(
        run_id=str(row["run_id"]),
        agent=row["agent"],
        agent_version=row["agent_version"],
        state=row["state"],
        error_reason=row["error_reason"],
        end_time=to_timestamp(row["end_time"]),
        duration_ms=row["duration_ms"],
        queue_ms=row["queue_ms"],
        stages=_stages(row),
        model_calls=row["model_calls"],
        tool_calls=row["tool_calls"],
        tool_errors=row["tool_errors"],
        cache_hits=row["cache_hits"],
        retries=row["retries"],
        recoveries=row["recoveries"],
        usage=types_pb2.Usage(
            input_tokens=row["input_tokens"], output_tokens=row["output_tokens"], cost_usd=row["cost_usd"]
        ),
        trace_id=row["trace_id"],
        user_id=row["user_id"],
        waiting_ms=row["waiting_ms"],
    )


def to_event(event: bytes) -> events_pb2.RunEvent:
    """The event of a row of `events`."""
    return events_pb2.RunEvent.FromString(event)


@contextmanager
def storable() -> Iterator[None]:
    """Turns a value of the caller's that no column can hold, such as a NUL in a text, into REQUEST_INVALID."""
    try:
        yield
    except asyncpg.DataError as error:
        detail = str(error).splitlines()[0]
        raise MainspringError(
            Reason.REQUEST_INVALID, f"A value of the request cannot be stored: {detail}: correct it.", field=""
        ) from error


def _stages(row: Row) -> list[types_pb2.Stage]:
    return [types_pb2.Stage(**stage) for stage in orjson.loads(row["stages"] or "[]")]


@asynccontextmanager
async def as_user(pool: postgres.Pool, user: UserExecutionContext) -> AsyncIterator[postgres.Connection]:
    """A transaction that sees what the user may; a value of the user's that no column can hold is REQUEST_INVALID."""
    with storable():
        async with postgres.as_user(pool, user.tenant_id, user_id=user.user_id) as connection:
            yield connection


def _of_json(text: str | None, message: type[Any]) -> Any:
    """Any: a message whose fields are the keys; None stays unset."""
    return None if text is None else message(**orjson.loads(text))
