"""What a client asks, read from its frames and bodies: every field is known, of its type and within its bounds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
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
# Part of the protocol, but not of this release.
_LATER_OPS: Final = frozenset({"pause", "resume", "retry", "signal", "approve"})
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
class Cancel:
    """Ask for the end of a run."""

    frame_id: FrameId
    run_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask for a sign of life."""

    frame_id: FrameId


Command = Hello | Renewal | Start | FollowRun | UnfollowRun | Cancel | Ping


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
    """Reads a client frame; REQUEST_INVALID names the field that is unknown or wrong, NOT_IMPLEMENTED a later op."""
    op = fields.get("op")
    if not isinstance(op, str):
        raise _invalid("op", "must be a text that names what to do")
    if "id" in fields and frame_id_of(fields) is None:
        raise _invalid("id", f"must be a text of at most {_FRAME_ID_CHARACTERS_MAX} characters or a whole number")
    if op in _LATER_OPS:
        raise _later(op)
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
        input=_json(value),
        session_id=_text(fields, "session_id", characters_max=128),
        idempotency_key=given or idempotency_key,
    )


def read_cancel_reason(fields: Fields) -> str:
    """Reads the body of a cancel."""
    _refuse_unknown(fields, ("reason",))
    return _text(fields, "reason", characters_max=1_000)


def run_id_of(text: object) -> str:
    """A run id in its one form. What can't be a run's id is no run's: RUN_NOT_FOUND, as for an unknown one."""
    if isinstance(text, str) and _RUN_ID.fullmatch(run_id := text.lower()):
        return run_id
    raise MainspringError(
        Reason.RUN_NOT_FOUND,
        f"No run {str(text)[:64]!r} is visible to you: check the id, and whose token you use.",
        run_id=str(text)[:64],
    )


def seq_of(fields: Fields, name: str) -> int:
    """A seq as a whole number, 0 where it is not given."""
    seq = fields.get(name, 0)
    if not isinstance(seq, int) or isinstance(seq, bool) or not 0 <= seq <= SEQ_MAX:
        raise _invalid(name, "must be a whole number, 0 or more")
    return seq


def _read_follow(fields: Fields) -> FollowRun:
    if "session_id" in fields or any(name in fields for name in _LATER_FOLLOW_FIELDS):
        raise _later("follow by session or user")
    run_id = run_id_of(_text(fields, "run_id", characters_max=128, is_required=True))
    return FollowRun(frame_id_of(fields), run_id, seq_of(fields, "after_seq"))


def _read_unfollow(fields: Fields) -> UnfollowRun:
    return UnfollowRun(frame_id_of(fields), run_id_of(_text(fields, "run_id", characters_max=128, is_required=True)))


def _read_cancel(fields: Fields) -> Cancel:
    run_id = run_id_of(_text(fields, "run_id", characters_max=128, is_required=True))
    return Cancel(frame_id_of(fields), run_id, _text(fields, "reason", characters_max=1_000))


def _token(fields: Fields) -> str:
    return _text(fields, "token", characters_max=TOKEN_CHARACTERS_MAX, is_required=True)


_START_FIELDS: Final = ("agent", "alias", "version", "input", "session_id", "idempotency_key")
# op -> the fields it may have besides `op` and `id`, and its reader.
_READERS: Final[dict[str, tuple[tuple[str, ...], Callable[[Fields], Command]]]] = {
    "hello": (("token",), lambda fields: Hello(frame_id_of(fields), _token(fields))),
    "token": (("token",), lambda fields: Renewal(frame_id_of(fields), _token(fields))),
    "ping": ((), lambda fields: Ping(frame_id_of(fields))),
    "start": (_START_FIELDS, read_start),
    "follow": (("run_id", "after_seq", "session_id", *_LATER_FOLLOW_FIELDS), _read_follow),
    "unfollow": (("run_id",), _read_unfollow),
    "cancel": (("run_id", "reason"), _read_cancel),
}


def _json(value: Fields) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise _invalid("input", f"cannot be passed on: {error}") from error


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
