"""The unfinished text of a model step as clients are shown it: frames for who has seen how much of it."""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

import orjson

from mainspring_gateway.core.frames import text_frame

FRAME_CHARACTERS_MAX: Final = 64 << 10


class Draft:
    """The text so far of one attempt at one step of a run. Offsets count Unicode characters."""

    __slots__ = ("_frame", "_pieces", "_starts", "is_over", "length", "run_id", "size_bytes", "step")

    def __init__(self, run_id: str, step: int) -> None:
        self.run_id = run_id
        self.step = step
        self.length = 0
        self.size_bytes = 0
        # Its step has ended, or another attempt has begun: nothing more of it is shown.
        self.is_over = False
        self._pieces: list[str] = []
        self._starts: list[int] = []
        # The frame made last, and from where to where it goes: all watchers that keep up are sent the same.
        self._frame: tuple[int, int, bytes] = (0, 0, b"")

    def add(self, text: str) -> None:
        """Takes what follows."""
        self._pieces.append(text)
        self._starts.append(self.length)
        self.length += len(text)
        self.size_bytes += len(text) if text.isascii() else len(text.encode())

    def end(self) -> None:
        """Gives the text up."""
        self.is_over = True
        self._pieces.clear()

    def frame(self, offset: int) -> tuple[bytes, int]:
        """What follows the offset as one frame, and the offset behind it; no bytes where nothing follows."""
        if self.is_over or offset >= self.length:
            return b"", offset
        begin, end, frame = self._frame
        if begin == offset and (end == self.length or end - begin == FRAME_CHARACTERS_MAX):
            return frame, end
        first = bisect_right(self._starts, offset) - 1
        text = "".join(self._pieces[first:])[offset - self._starts[first] :][:FRAME_CHARACTERS_MAX]
        fields = {"op": "delta", "run_id": self.run_id, "step": self.step, "offset": offset, "text": text}
        frame, end = text_frame(orjson.dumps(fields)), offset + len(text)
        self._frame = (offset, end, frame)
        return frame, end
