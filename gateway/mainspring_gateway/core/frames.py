"""What the gateway sends on a WebSocket besides events: replies as JSON objects, and the bytes of server frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson
from mainspring_kit.errors import MainspringError

# A client's own frame id, echoed as it came.
FrameId = str | int | None

PING_FRAME: Final = b"\x89\x00"
PONG: Final = 0xA
_TEXT: Final = 0x1


def text_frame(payload: bytes) -> bytes:
    """A whole text message as an unmasked server frame (RFC 6455, section 5.2)."""
    return _header(_TEXT, len(payload)) + payload


def pong_frame(payload: bytes) -> bytes:
    """The answer to a ping; its payload is the ping's, at most 125 bytes."""
    return _header(PONG, len(payload)) + payload


def reply(op: str, frame_id: FrameId = None, **fields: object) -> bytes:
    """A server frame of this `op`, echoing the client's id where it gave one."""
    return text_frame(orjson.dumps({"op": op, **_echo(frame_id), **fields}))


def error_frame(frame_id: FrameId, error: MainspringError) -> bytes:
    """An error as a server frame."""
    fields: dict[str, object] = {
        "code": error.code.name,
        "reason": error.reason_name,
        "message": error.message,
        "metadata": error.metadata,
    }
    if error.retry_after_seconds is not None:
        fields["retry_after_ms"] = round(error.retry_after_seconds * 1e3)
    return reply("error", frame_id, **fields)


def _echo(frame_id: FrameId) -> Mapping[str, Any]:
    return {} if frame_id is None else {"id": frame_id}


def _header(opcode: int, size: int) -> bytes:
    first = 0x80 | opcode
    if size < 126:
        return bytes((first, size))
    if size < 65_536:
        return bytes((first, 126)) + size.to_bytes(2, "big")
    return bytes((first, 127)) + size.to_bytes(8, "big")
