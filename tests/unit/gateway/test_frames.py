"""Server frames are whole, unmasked and of the right length, and errors carry all they have."""

import orjson
import pytest
from mainspring_gateway.core.frames import PING_FRAME, FrameId, error_frame, pong_frame, reply, text_frame
from mainspring_kit.errors import RULES, MainspringError

pytestmark = pytest.mark.unit


def payload_of(frame: bytes) -> tuple[int, bytes]:
    """Reads one frame as RFC 6455 says: its opcode and payload."""
    assert frame[0] & 0xF0 == 0x80
    assert not frame[1] & 0x80
    size, begin = frame[1] & 0x7F, 2
    if size == 126:
        size, begin = int.from_bytes(frame[2:4], "big"), 4
        assert size >= 126
    elif size == 127:
        size, begin = int.from_bytes(frame[2:10], "big"), 10
        assert size >= 65_536
    assert len(frame) == begin + size
    return frame[0] & 0x0F, frame[begin:]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 1 << 20])
def test_a_text_frame_of_any_size(size: int) -> None:
    assert payload_of(text_frame(b"x" * size)) == (1, b"x" * size)


def test_control_frames() -> None:
    assert payload_of(PING_FRAME) == (9, b"")
    assert payload_of(pong_frame(b"abc")) == (10, b"abc")


@pytest.mark.parametrize(("frame_id", "echo"), [(None, {}), ("1", {"id": "1"}), (0, {"id": 0}), ("", {"id": ""})])
def test_a_reply_echoes_the_id(frame_id: FrameId, echo: dict[str, object]) -> None:
    assert orjson.loads(payload_of(reply("ok", frame_id))[1]) == {"op": "ok", **echo}


@pytest.mark.parametrize("reason", RULES)
def test_every_reason_makes_an_error_frame(reason: str) -> None:
    error = MainspringError(RULES[reason], "what, which one, what next")
    fields = orjson.loads(payload_of(error_frame("7", error))[1])
    assert fields["op"] == "error"
    assert fields["id"] == "7"
    assert (fields["code"], fields["reason"]) == (RULES[reason].code.name, reason)
    assert fields["metadata"] == {}
    assert ("retry_after_ms" in fields) == (fields["code"] in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"))
