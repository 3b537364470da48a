"""A start request: what it must be, what it hashes to, and the append that makes its run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import orjson
from mainspring.v1 import events_pb2, execution_pb2, registry_pb2, state_pb2
from mainspring_kit.errors import MainspringError, Reason, Violation

from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.record import Envelope

_RUN_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")


# Texts and other numbers are skipped; what is left in the group is an integer.
_INTEGERS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"|-?\d+(?:\.\d+|[eE])[-+\deE]*|(-?\d{19,})')
# A tenth of a second for a MiB of short texts: only where it may find something.
_MANY_DIGITS: Final = re.compile(rb"\d{19}")


@dataclass(frozen=True, slots=True)
class Origin:
    """Of a run that goes on with another one's work. `seq`: its steps up to this event are taken over; 0: none."""

    run_id: str = ""
    seq: int = 0
    attempt: int = 1


NO_ORIGIN: Final = Origin()


def check_known_run_id(run_id: str) -> None:
    """RUN_NOT_FOUND when no run can have this id."""
    if _UUID.fullmatch(run_id) is None:
        raise run_not_found(run_id)


def check_run_id(run_id: str) -> None:
    """REQUEST_INVALID when a new run cannot have this id."""
    if not _RUN_ID.fullmatch(run_id):
        raise request_invalid("context.run_id", "it must be a UUIDv7 in lower case")


def read_input(data: bytes) -> bytes:
    """The input as it is stored; REQUEST_INVALID when it is not JSON, or has integers over 64 bits."""
    return check_json(data, field="start.input") or b"{}"


def check_json(data: bytes, *, field: str) -> bytes:
    """The bytes themselves; REQUEST_INVALID when they are not JSON, or have integers over 64 bits. Empty: nothing."""
    if not data:
        return data
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise request_invalid(field, f"it is not JSON: {error}") from error
    for found in _INTEGERS.finditer(data) if _MANY_DIGITS.search(data) else ():
        if found[1] and (len(found[1]) > 20 or not -(1 << 63) <= int(found[1]) < 1 << 64):
            raise request_invalid(field, "an integer has more than 64 bits: send it as text")
    return data


def hash_request(start: execution_pb2.StartRunRequest, session_id: str, *, origin: Origin = NO_ORIGIN) -> bytes:
    """SHA-256 over what the client asked for: what must be the same when an idempotency key comes again."""
    digest = hashlib.sha256()
    for part in (
        start.agent.encode(),
        start.alias.encode(),
        start.version.encode(),
        session_id.encode(),
        start.input,
        *_rarely_asked(start, origin),
    ):
        digest.update(len(part).to_bytes(4, "big"))
        digest.update(part)
    return digest.digest()


def make_create(
    plan: AgentPlan,
    start: execution_pb2.StartRunRequest,
    *,
    envelope: Envelope,
    user_id: str,
    asked_session_id: str,
    input_json: bytes,
    executor_id: str,
    follower_id: str,
    now: float,
    limits: registry_pb2.TenantLimits,
    queue_only: bool = False,
    origin: Origin = NO_ORIGIN,
) -> tuple[state_pb2.CreateRun, events_pb2.RunEvent]:
    """The create of a run and its agent_started; `now` in seconds since 1970, `limits` of its tenant."""
    create = state_pb2.CreateRun(
        user_id=user_id,
        session_id=envelope.session_id,
        agent=plan.agent,
        agent_version=plan.version,
        input=input_json,
        idempotency_key=start.idempotency_key,
        request_hash=hash_request(start, asked_session_id, origin=origin) if start.idempotency_key else b"",
        executor_id=executor_id,
        trace_id=envelope.trace_id,
        follower_id=follower_id,
        policy=start.session_policy,
        priority=start.priority if start.HasField("priority") else plan.priority,
        weight=limits.weight,
        backlog_max=limits.backlog_max,
        queue_only=queue_only,
    )
    if origin.run_id:
        create.source_run_id, create.source_seq, create.attempt = origin.run_id, origin.seq, origin.attempt
    if plan.webhook_url:
        create.webhook.url = plan.webhook_url
    caps = {
        "tenant": limits.max_concurrent,
        f"user/{user_id}": limits.max_concurrent_per_user,
        f"agent/{plan.agent}": plan.concurrent_max,
        f"agent/{plan.agent}/user/{user_id}": plan.concurrent_per_user_max,
    }
    for scope, limit in caps.items():
        if limit:
            create.caps.add(scope=scope, limit=limit)
    if start.HasField("start_time"):
        create.due_time.CopyFrom(start.start_time)
        now = max(now, start.start_time.seconds + start.start_time.nanos / 1e9)
    create.deadline.FromMicroseconds(int((now + plan.timeout_seconds) * 1e6))
    started = events_pb2.AgentStarted(
        agent_version=plan.version,
        input=input_json,
        attempt=origin.attempt,
        source_run_id=origin.run_id,
        source_seq=origin.seq,
    )
    return create, envelope.event(1, agent_started=started)


def _rarely_asked(start: execution_pb2.StartRunRequest, origin: Origin) -> Iterator[bytes]:
    """What only some starts say, so that the hashes of the others stay what they were."""
    if start.HasField("priority"):
        yield b"priority %d" % start.priority
    if start.HasField("start_time"):
        yield b"start_time %d.%09d" % (start.start_time.seconds, start.start_time.nanos)
    if origin.run_id:
        yield b"origin %s %d" % (origin.run_id.encode(), origin.seq)


def run_not_found(run_id: str) -> MainspringError:
    """RUN_NOT_FOUND: no run can have this id."""
    return MainspringError(
        Reason.RUN_NOT_FOUND, f"There is no run {run_id[:64]!r}: list the runs for the right id.", run_id=run_id[:64]
    )


def request_invalid(field: str, fault: str) -> MainspringError:
    """REQUEST_INVALID: what is wrong with which field."""
    return MainspringError(
        Reason.REQUEST_INVALID,
        f"The request breaks its rules: {field}: {fault}.",
        violations=[Violation(field, fault)],
        field=field,
    )
