"""A WebSocket client that sends whatever bytes it is told to, and reads what comes back frame by frame."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from test_framework.websocket_client import Frame

SECONDS = 30.0
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
MASK = b"\x0b\x1e\xca\xfe"


def client_frame(opcode: int, payload: bytes, *, first_bits: int = 0x80, is_masked: bool = True) -> bytes:
    """One frame as clients send them; `first_bits`: FIN and the reserved ones."""
    size = len(payload)
    mask_bit = 0x80 if is_masked else 0
    if size < 126:
        head = bytes((first_bits | opcode, mask_bit | size))
    elif size < 65_536:
        head = bytes((first_bits | opcode, mask_bit | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first_bits | opcode, mask_bit | 127)) + struct.pack("!Q", size)
    if not is_masked:
        return head + payload
    keys = (MASK * (size // 4 + 1))[:size]
    masked = (int.from_bytes(payload, "big") ^ int.from_bytes(keys, "big")).to_bytes(size, "big")
    return head + MASK + masked


@dataclass(frozen=True, slots=True)
class Ending:
    """How a socket ended: the close code, 0 where none came, and its text."""

    code: int
    reason: str


class RawSocket:
    """An open socket. `frames` holds the JSON that came so far."""

    def __init__(self, gateway: str, *, token: str = "") -> None:
        address = urlsplit(gateway)
        self._connection = socket.create_connection((address.hostname, address.port), SECONDS)
        self._data = b""
        self.frames: list[Frame] = []
        self.ending: Ending | None = None
        authorization = f"Authorization: Bearer {token}\r\n" if token else ""
        self._connection.sendall(
            f"GET /v1/stream HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{authorization}\r\n".encode()
        )
        head = self._take_until(b"\r\n\r\n")
        assert b" 101 " in head, head

    def send(self, data: bytes) -> None:
        """Sends bytes; a gateway that has hung up already is not told so."""
        try:
            self._connection.sendall(data)
        except ConnectionError:
            self._connection.setblocking(True)

    def wait_for(self, condition: Callable[[], Any]) -> None:  # Any: a truth value
        """Reads until the condition holds or the socket has ended."""
        while self.ending is None and not condition():
            self._read_frame()

    def finish(self) -> Ending:
        """Sends no more, and reads to the end."""
        try:
            self._connection.shutdown(socket.SHUT_WR)
        except OSError:
            self.ending = self.ending or Ending(0, "")
        self.wait_for(lambda: False)
        assert self.ending is not None
        return self.ending

    def close(self) -> None:
        """Lets go of the connection."""
        self._connection.close()

    def _read_frame(self) -> None:
        try:
            opcode, payload = self._frame()
        except ConnectionError:
            self.ending = Ending(0, "")
            return
        if opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big")
            self.ending = Ending(code, payload[2:].decode())
        elif opcode == TEXT:
            self.frames.append(json.loads(payload))
        else:
            assert opcode in (PING, PONG), opcode

    def _frame(self) -> tuple[int, bytes]:
        first, size = self._take(2)
        assert first & 0x70 == 0 and size < 128, (first, size)
        if size == 126:
            size = int.from_bytes(self._take(2), "big")
        elif size == 127:
            size = int.from_bytes(self._take(8), "big")
        return first & 0x0F, self._take(size)

    def _take(self, size: int) -> bytes:
        while len(self._data) < size:
            self._receive()
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def _take_until(self, end: bytes) -> bytes:
        while end not in self._data:
            self._receive()
        taken, _, self._data = self._data.partition(end)
        return taken

    def _receive(self) -> None:
        more = self._connection.recv(1 << 16)
        if not more:
            raise ConnectionResetError("the gateway has hung up")
        self._data += more


def errors_of(frames: list[Frame]) -> Iterator[Frame]:
    """The error frames."""
    return (frame for frame in frames if frame["op"] == "error")
