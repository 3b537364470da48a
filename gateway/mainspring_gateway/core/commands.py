"""What a client asks, read from its frames and bodies: every field is known, of its type and within its bounds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import execution_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason, Violation

from mainspring_gateway.core.frames import FrameId

SEQ_MAX: Final = (1 << 63) - 1
TOKEN_CHARACTERS_MAX: Final = 8_192

_FRAME_ID_CHARACTERS_MAX: Final = 128
_RUN_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Texts and other numbers are skipped; what is left in the group is an integer.
_INTEGERS: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"|-?\d+(?:\.\d+|[eE])[-+\deE]*|(-?\d{19,})')
# A tenth of a second for a MiB of short texts: only where it may find something.
_MANY_DIGITS: Final = re.compile(r"\d{19}")
_APPROVAL_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.[0-9]{1,18}")
# Part of the protocol, but not of this release.
_LATER_FOLLOW_FIELDS: Final = ("scope", "after", "since")

# A JSON object as parsed: Any.
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Hello:
    """The credential, where no header could carry it."""

    frame_id: FrameId
    token: str


@dataclass(frozen=True, slots=True)
class Renewal:
    """A new credential of the same user, before the old one expires."""

    frame_id: FrameId
    token: str


@dataclass(frozen=True, slots=True)
class Start:
    """Start a run. `input` is JSON; an empty text stands for a field that was not given."""

    frame_id: FrameId
    agent: str
    alias: str
    version: str
    input: bytes
    session_id: str
    idempotency_key: str
    priority: int | None = None
    start_time: Timestamp | None = None


@dataclass(frozen=True, slots=True)
class FollowRun:
    """Show a run's events from after a seq."""

    frame_id: FrameId
    run_id: str
    after_seq: int


@dataclass(frozen=True, slots=True)
class UnfollowRun:
    """Show a run's events no longer."""

    frame_id: FrameId
    run_id: str


@dataclass(frozen=True, slots=True)
class Control:
    """Ask for the end of a run, for a halt, or to let it go on: `verb` is cancel, pause or resume."""

    frame_id: FrameId
    verb: str
    run_id: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Retry:
    """Start an ended run again, and show the new one's events."""

    frame_id: FrameId
    run_id: str


@dataclass(frozen=True, slots=True)
class Signal:
    """Send a run something to take. `data` is JSON; empty: nothing."""

    frame_id: FrameId
    run_id: str
    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Approve:
    """Answer an approval. `data` is JSON; empty: nothing."""

    frame_id: FrameId
    approval_id: str
    decision: types_pb2.ApprovalDecision.ValueType
    data: bytes


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask for a sign of life."""

    frame_id: FrameId


Command = Hello | Renewal | Start | FollowRun | UnfollowRun | Control | Retry | Signal | Approve | Ping


def decode_object(data: bytes | str) -> Fields:
    """Parses one JSON object; REQUEST_INVALID for anything else, NaN, Infinity and integers over 64 bits included."""
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _invalid("", f"it is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise _invalid("", "it is JSON, but not an object")
    text = data if isinstance(data, str) else data.decode()
    for found in _INTEGERS.finditer(text) if _MANY_DIGITS.search(text) else ():
        if found[1] and (len(found[1]) > 20 or not -(1 << 63) <= int(found[1]) < 1 << 64):
            raise _invalid("", "an integer has more than 64 bits: send it as text")
    return parsed


def frame_id_of(fields: Fields) -> FrameId:
    """The frame's own id, to echo; None when it has none that could be echoed."""
    frame_id = fields.get("id")
    if isinstance(frame_id, str) and len(frame_id) <= _FRAME_ID_CHARACTERS_MAX:
        return frame_id
    return frame_id if isinstance(frame_id, int) and not isinstance(frame_id, bool) else None


def read_command(fields: Fields) -> Command:
    """Reads a client frame; REQUEST_INVALID names the field that is unknown or wrong."""
    op = fields.get("op")
    if not isinstance(op, str):
        raise _invalid("op", "must be a text that names what to do")
    if "id" in fields and frame_id_of(fields) is None:
        raise _invalid("id", f"must be a text of at most {_FRAME_ID_CHARACTERS_MAX} characters or a whole number")
    if op not in _READERS:
        raise _invalid("op", f"{op[:32]!r} is not known here; known are {', '.join(sorted(_READERS))}")
    known, read = _READERS[op]
    _refuse_unknown(fields, ("op", "id", *known))
    return read(fields)


def read_start(fields: Fields, *, idempotency_key: str = "") -> Start:
    """Reads the fields of a start; `idempotency_key` is the one that came beside them, if one did."""
    _refuse_unknown(fields, ("op", "id", *_START_FIELDS))
    given = _text(fields, "idempotency_key", characters_max=128)
    if idempotency_key and given and given != idempotency_key:
        raise _invalid("idempotency_key", "differs from the Idempotency-Key header: send one of them")
    value = fields.get("input", {})
    if not isinstance(value, dict):
        raise _invalid("input", "must be an object")
    return Start(
        frame_id_of(fields),
        agent=_text(fields, "agent", characters_max=63, is_required=True),
        alias=_text(fields, "alias", characters_max=63),
        version=_text(fields, "version", characters_max=20),
        input=_json("input", value),
        session_id=_text(fields, "session_id", characters_max=128),
        idempotency_key=given or idempotency_key,
        priority=_whole(fields, "priority", least=-100, most=100) if "priority" in fields else None,
        start_time=_time(fields, "start_time"),
    )


def read_reason(fields: Fields, *, known: tuple[str, ...] = ("reason",)) -> str:
    """Reads the body of a cancel or a pause; of a resume or a retry, which have nothing to say, with `known` empty."""
    _refuse_unknown(fields, known)
    return _text(fields, "reason", characters_max=1_000)


def read_signal(fields: Fields, run_id: str) -> Signal:
    """Reads the fields of a signal."""
    _refuse_unknown(fields, ("op", "id", "run_id", "name", "data"))
    name = _text(fields, "name", characters_max=100, is_required=True)
    return Signal(frame_id_of(fields), run_id, name, _data(fields))


def read_answer(fields: Fields, approval_id: object) -> Approve:
    """Reads the fields of an answer to an approval."""
    _refuse_unknown(fields, ("op", "id", "approval_id", "decision", "data"))
    decision = _DECISIONS.get(_text(fields, "decision", characters_max=16, is_required=True))
    if decision is None:
        raise _invalid("decision", "must be allow or deny")
    return Approve(frame_id_of(fields), approval_id_of(approval_id), decision, _data(fields))


def read_fork(fields: Fields, run_id: str) -> execution_pb2.ForkRunRequest:
    """Reads the body of a fork: `seq`, and where they differ from the source's `session_id` and `version`."""
    _refuse_unknown(fields, ("seq", "session_id", "version"))
    return execution_pb2.ForkRunRequest(
        run_id=run_id,
        seq=_whole(fields, "seq", least=1, most=SEQ_MAX),
        session_id=_text(fields, "session_id", characters_max=128),
        version=_text(fields, "version", characters_max=20),
    )


def run_id_of(text: object) -> str:
    """A run id in its one form. What can't be a run's id is no run's: RUN_NOT_FOUND, as for an unknown one."""
    if isinstance(text, str) and _RUN_ID.fullmatch(run_id := text.lower()):
        return run_id
    raise MainspringError(
        Reason.RUN_NOT_FOUND,
        f"No run {str(text)[:64]!r} is visible to you: check the id, and whose token you use.",
        run_id=str(text)[:64],
    )


def approval_id_of(text: object) -> str:
    """An approval's id in its one form: `<run id>.<seq>`; APPROVAL_NOT_FOUND for what can't be one."""
    if isinstance(text, str) and _APPROVAL_ID.fullmatch(approval_id := text.lower()):
        return approval_id
    raise MainspringError(
        Reason.APPROVAL_NOT_FOUND,
        f"No approval {str(text)[:64]!r} is visible to you: check the id, and whose token you use.",
        approval_id=str(text)[:64],
    )


def seq_of(fields: Fields, name: str) -> int:
    """A seq as a whole number, 0 where it is not given."""
    return _whole(fields, name, least=0, most=SEQ_MAX) if name in fields else 0


def _read_follow(fields: Fields) -> FollowRun:
    if "session_id" in fields or any(name in fields for name in _LATER_FOLLOW_FIELDS):
        raise _later("follow by session or user")
    return FollowRun(frame_id_of(fields), _run_id(fields), seq_of(fields, "after_seq"))


def _read_control(fields: Fields) -> Control:
    reason = _text(fields, "reason", characters_max=1_000)
    return Control(frame_id_of(fields), fields["op"], _run_id(fields), reason)


def _run_id(fields: Fields) -> str:
    return run_id_of(_text(fields, "run_id", characters_max=128, is_required=True))


def _token(fields: Fields) -> str:
    return _text(fields, "token", characters_max=TOKEN_CHARACTERS_MAX, is_required=True)


_DECISIONS: Final = {"allow": types_pb2.APPROVAL_DECISION_ALLOW, "deny": types_pb2.APPROVAL_DECISION_DENY}
_START_FIELDS: Final = (
    "agent",
    "alias",
    "version",
    "input",
    "session_id",
    "idempotency_key",
    "priority",
    "start_time",
)
# op -> the fields it may have besides `op` and `id`, and its reader.
_READERS: Final[dict[str, tuple[tuple[str, ...], Callable[[Fields], Command]]]] = {
    "hello": (("token",), lambda fields: Hello(frame_id_of(fields), _token(fields))),
    "token": (("token",), lambda fields: Renewal(frame_id_of(fields), _token(fields))),
    "ping": ((), lambda fields: Ping(frame_id_of(fields))),
    "start": (_START_FIELDS, read_start),
    "follow": (("run_id", "after_seq", "session_id", *_LATER_FOLLOW_FIELDS), _read_follow),
    "unfollow": (("run_id",), lambda fields: UnfollowRun(frame_id_of(fields), _run_id(fields))),
    "cancel": (("run_id", "reason"), _read_control),
    "pause": (("run_id", "reason"), _read_control),
    "resume": (("run_id",), _read_control),
    "retry": (("run_id",), lambda fields: Retry(frame_id_of(fields), _run_id(fields))),
    "signal": (("run_id", "name", "data"), lambda fields: read_signal(fields, _run_id(fields))),
    "approve": (("approval_id", "decision", "data"), lambda fields: read_answer(fields, fields.get("approval_id"))),
}


def _data(fields: Fields) -> bytes:
    return _json("data", fields["data"]) if fields.get("data") is not None else b""


def _json(name: str, value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise _invalid(name, f"cannot be passed on: {error}") from error


def _whole(fields: Fields, name: str, *, least: int, most: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _invalid(name, f"must be a whole number from {least} to {most}")
    return value


def _time(fields: Fields, name: str) -> Timestamp | None:
    if name not in fields:
        return None
    try:
        time = datetime.fromisoformat(_text(fields, name, characters_max=64, is_required=True))
        if time.tzinfo is not None:
            found = Timestamp()
            found.FromDatetime(time.astimezone(UTC))
            return found
    except (ValueError, OverflowError) as error:
        raise _invalid(name, "must be a time as RFC 3339 writes it, such as 2026-11-24T03:06:12Z") from error
    raise _invalid(name, "must say its zone: end it with Z or an offset such as +01:00")


def _text(fields: Fields, name: str, *, characters_max: int, is_required: bool = False) -> str:
    if name not in fields and not is_required:
        return ""
    value = fields.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= characters_max:
        raise _invalid(name, f"must be a text of 1 to {characters_max} characters")
    return value


def _refuse_unknown(fields: Fields, known: tuple[str, ...]) -> None:
    for name in fields:
        if name not in known:
            raise _invalid(name[:64], f"is not a field of this; its fields are {', '.join(known)}")


def _invalid(field: str, description: str) -> MainspringError:
    subject = f"The field {field}" if field else "What was sent is not usable"
    separator = " " if field else ": "
    return MainspringError(
        Reason.REQUEST_INVALID,
        f"{subject}{separator}{description}.",
        violations=[Violation(field, description)],
        field=field,
    )


def _later(what: str) -> MainspringError:
    return MainspringError(
        Reason.NOT_IMPLEMENTED,
        f"{what} is part of the protocol but not of this release: see the changelog for when it comes.",
        method=what,
    )
