"""The WebSocket attacked with operations whose fields are wrong, with JSON of any kind, and with broken frames."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_framework.agents import echo_agent
from test_framework.identities import make_context
from test_framework.loop_thread import LoopThread
from test_framework.stack import Stack
from test_framework.user import User
from test_framework.websocket_client import Frame
from tests.fuzz.conftest import AT_A_TIME, Attack
from tests.fuzz.messages import JSONS, TEXTS
from tests.fuzz.raw_socket import BINARY, CLOSE, PING, PONG, TEXT, RawSocket, client_frame
from tests.fuzz.witness import Witness

pytestmark = [pytest.mark.fuzz, pytest.mark.real_services, pytest.mark.security, pytest.mark.websocket]

CHECK_SECONDS = 120.0
SERVER_OPS = {"welcome", "event", "delta", "error", "ok", "started", "pong", "caught_up"}
# What a client's own fault may end a socket with; 0: the gateway hung up on bytes that are no WebSocket.
CLOSE_CODES = {0, 1000, 1002, 1003, 1007, 1009, 4400, 4401, 4408}
FENCE = "fence"
# The operations with the fields that make them right.
OPS = {
    "start": ("agent", "input"),
    "follow": ("run_id", "after_seq"),
    "unfollow": ("run_id",),
    "cancel": ("run_id", "reason"),
    "token": ("token",),
    "ping": (),
    "hello": ("token",),
    "pause": ("run_id",),
    "resume": ("run_id",),
    "retry": ("run_id",),
    "signal": ("run_id", "name", "data"),
    "approve": ("approval_id", "decision", "data"),
}
FIELDS = (
    "id",
    "alias",
    "version",
    "session_id",
    "idempotency_key",
    "priority",
    "start_time",
    "scope",
    "since",
    "user_id",
    "tenant_id",
    "extra",
    "",
)
NUMBERS = (0, -1, 1, 17, 1 << 63, -(1 << 63), 1e308, 5e-324, -0.0)
# Texts that end the socket: none is a JSON object that could be passed on.
NO_OBJECTS = (
    *JSONS[3:14],
    b"",
    b" ",
    b"\xef\xbb\xbf{}",
    b"{}{}",
    b"NaN",
    b'{"a":18446744073709551617}',
    b'"' + b"a" * 70_000 + b'"',
)
# Objects that JSON leaves undecided.
ODD_OBJECTS = (
    b'{"op":"ping","op":"start"}',
    b'{"op":"ping","id":"a","id":"b"}',
    b'{"\\u006fp":"ping"}',
    b'{"op":"start","agent":"echo","input":' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}",
    b'{"op":"start","agent":"echo","input":{"":{"__proto__":null}}}',
    b'{"op":"start","agent":"echo","input":{"value":"' + b"x" * 200_000 + b'"}}',
    b"{" + b",".join(b'"k%d":1' % number for number in range(3_000)) + b"}",
)


class Attacker:
    """A user of a tenant of its own, and what may be said in its name."""

    def __init__(self, stack: Stack, token: str, *, words: dict[str, list[Any]]) -> None:  # Any: JSON values
        self.gateway = stack.gateway
        self.token = token
        self._words = words

    @classmethod
    async def begin(cls, stack: Stack, *, foreign_run_id: str) -> Attacker:
        """An attacker with an agent and a finished run."""
        context = make_context()
        async with User(stack, context) as user:
            await user.register(echo_agent())
            async with user.stream() as socket:
                events = await socket.run("echo", {"value": 1})
            words: dict[str, list[Any]] = {
                "agent": ["echo"],
                "run_id": [events[0]["run_id"], foreign_run_id],
                "session_id": ["s-1", "s-2"],
                "input": [{}, {"value": 1}],
                "after_seq": [0, 3, 99],
                "token": [user.token],
                "idempotency_key": ["k-1", "k-2"],
                "approval_id": [f"{events[0]['run_id']}.3", f"{foreign_run_id}.3"],
                "decision": ["allow", "deny"],
                "name": ["go"],
                "data": [None, {"a": [1]}],
            }
            return cls(stack, user.token, words=words)

    def operations(self) -> st.SearchStrategy[bytes]:
        """Text messages that are JSON objects: most of them nearly an operation."""
        leaves = st.one_of(
            st.sampled_from(TEXTS), st.sampled_from(NUMBERS), st.booleans(), st.none(), st.text(max_size=5)
        )
        values = st.recursive(
            leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
        )

        @st.composite
        def made(draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
            op = draw(st.sampled_from(tuple(OPS)))
            frame = {"op": op, **{name: draw(st.sampled_from(self._words.get(name, ["x"]))) for name in OPS[op]}}
            fate = draw(st.integers(0, 3))
            if fate == 1:
                frame.pop(draw(st.sampled_from(tuple(frame))))
            elif fate == 2:
                frame[draw(st.sampled_from(tuple(frame)))] = draw(values)
            elif fate == 3:
                frame[draw(st.sampled_from(FIELDS))] = draw(values)
            return json.dumps(frame).encode()

        objects = st.dictionaries(st.text(max_size=5), values, max_size=4).map(
            lambda fields: json.dumps(fields).encode()
        )
        return st.one_of(made(), made(), made(), objects, st.sampled_from(ODD_OBJECTS))


def in_pieces(draw: Callable[[st.SearchStrategy[Any]], Any], message: bytes) -> bytes:
    """A text message as one frame, or in several with pings and pongs between them."""
    cuts = sorted(draw(st.lists(st.integers(0, len(message)), max_size=3)))
    parts = [message[start:end] for start, end in zip([0, *cuts], [*cuts, len(message)], strict=True)]
    sent = []
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        sent.append(client_frame(TEXT if index == 0 else 0, part, first_bits=0x80 if is_last else 0))
        if not is_last and draw(st.booleans()):
            sent.append(client_frame(draw(st.sampled_from((PING, PONG))), draw(st.binary(max_size=125))))
    return b"".join(sent)


def endings() -> st.SearchStrategy[bytes]:
    """Bytes after which a socket has to end, or that are cut off."""
    texts = st.sampled_from(NO_OBJECTS).map(lambda text: client_frame(TEXT, text))
    opcodes, payloads = st.integers(0, 15), st.binary(max_size=130)
    odd = st.builds(
        lambda opcode, payload, bits, is_masked: client_frame(opcode, payload, first_bits=bits, is_masked=is_masked),
        opcodes,
        payloads,
        st.sampled_from((0, 0x80, 0xC0, 0xA0, 0x90, 0xF0)),
        st.booleans(),
    )
    codes = st.sampled_from((0, 999, 1000, 1001, 1004, 1005, 1006, 1012, 1015, 2999, 3000, 4999, 65_535))
    closes = st.tuples(codes, payloads).map(lambda both: client_frame(CLOSE, both[0].to_bytes(2, "big") + both[1]))
    whole = st.one_of(texts, odd, closes, payloads.map(lambda payload: client_frame(BINARY, payload)))
    cut = st.tuples(whole, st.integers(0, 200)).map(lambda both: both[0][: both[1]])
    lengths = st.sampled_from(
        (b"\x81\xff" + b"\xff" * 8, b"\x81\xff\x7f" + b"\xff" * 7, b"\x81\xfe\x00\x00", b"\x01\xff")
    )
    return st.one_of(whole, whole, cut, lengths, st.binary(max_size=40))


def check_frames(frames: list[Frame]) -> None:
    """Every frame is one that docs name, and every error says what it is, and that it is not the gateway's."""
    for frame in frames:
        assert frame["op"] in SERVER_OPS, frame
        assert "bystander" not in json.dumps(frame), frame
        if frame["op"] == "error":
            assert frame["code"] not in ("INTERNAL", "UNKNOWN", "") and frame["reason"] and frame["message"], frame


def test_an_attacked_socket_answers_with_a_reason_and_nothing_is_left_behind(
    fuzz_stack: Stack, fuzz_loop: LoopThread, attacks: Callable[[Attack], Attack], tell: Callable[[str], None]
) -> None:
    witness = fuzz_loop.run(Witness.begin(fuzz_stack))
    attacker = fuzz_loop.run(Attacker.begin(fuzz_stack, foreign_run_id=witness.bystander.run_id))
    operations = attacker.operations()
    codes: Counter[int] = Counter()
    ops: Counter[str] = Counter()

    @st.composite
    def batches(draw: Callable[[st.SearchStrategy[Any]], Any]) -> list[bytes]:
        return [in_pieces(draw, draw(operations)) for _ in range(AT_A_TIME - 1)]

    @attacks
    @given(batches(), endings(), st.integers(0, 5))
    def attack(batch: list[bytes], ending: bytes, fate: int) -> None:
        with closing(RawSocket(attacker.gateway, token=attacker.token)) as known:
            fence = json.dumps({"op": "ping", "id": FENCE}).encode()
            known.send(b"".join(batch) + client_frame(TEXT, fence))
            known.wait_for(lambda: {"op": "pong", "id": FENCE} in known.frames)
            assert known.ending is None, known.frames[-1:]
            known.send(ending)
            end = known.finish()
            check_frames(known.frames)
        assert end.code in CLOSE_CODES, end
        codes[end.code] += 1
        ops.update(frame["op"] for frame in known.frames)
        if fate == 0:
            with closing(RawSocket(attacker.gateway)) as stranger:
                stranger.send(batch[0])
                end = stranger.finish()
                check_frames(stranger.frames)
            assert end.code in CLOSE_CODES, end

    attack()
    growth = fuzz_loop.run(witness.check(Counter()), CHECK_SECONDS)
    tell(f"closed with {dict(sorted(codes.items()))}, frames {dict(ops.most_common())}; {growth}")
