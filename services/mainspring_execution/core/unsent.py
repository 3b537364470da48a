"""Text on its way to a state process: what of each run has not been sent yet, merged and bounded."""

from __future__ import annotations

from typing import Final

from mainspring.v1 import events_pb2, state_pb2

# What may wait for one state process; a slow one gets less, never later.
UNSENT_CHARACTERS_MAX: Final = 4 << 20
FRAME_RUNS_MAX: Final = 512
FRAME_CHARACTERS_MAX: Final = 256 << 10


class TextSource:
    """One attempt at a model step, and how much of its text has been given so far."""

    __slots__ = ("is_lost", "length", "run_id", "step", "tenant_id", "user_id")

    def __init__(self, *, tenant_id: str, user_id: str, run_id: str, step: int) -> None:
        self.tenant_id = tenant_id
        self.user_id = user_id
        self.run_id = run_id
        self.step = step
        self.length = 0
        # A piece was dropped: what follows has no place any more.
        self.is_lost = False


class Unsent:
    """The text that waits for one state process, at most one piece a run."""

    def __init__(self, *, characters_max: int = UNSENT_CHARACTERS_MAX) -> None:
        self._characters_max = characters_max
        self._pieces: dict[str, tuple[TextSource, int, list[str]]] = {}
        self._characters = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, source: TextSource, text: str) -> bool:
        """Takes what follows in the source's text; false at the bound. A newer attempt or step replaces an older."""
        waiting = self._pieces.get(source.run_id)
        if waiting is not None and waiting[0] is not source:
            self._characters -= sum(map(len, self._pieces.pop(source.run_id)[2]))
            waiting = None
        if self._characters + len(text) > self._characters_max:
            return False
        if waiting is None:
            self._pieces[source.run_id] = (source, source.length, [text])
        else:
            waiting[2].append(text)
        self._characters += len(text)
        return True

    def clear(self) -> None:
        """Drops all: there is nobody to take it."""
        for source, _, _ in self._pieces.values():
            source.is_lost = True
        self._pieces.clear()
        self._characters = 0

    def take(self) -> list[state_pb2.PublishedDelta]:
        """A frame's worth, the longest waiting first."""
        frame: list[state_pb2.PublishedDelta] = []
        characters = 0
        for run_id in list(self._pieces):
            source, offset, pieces = self._pieces[run_id]
            text = "".join(pieces)
            if frame and (len(frame) >= FRAME_RUNS_MAX or characters + len(text) > FRAME_CHARACTERS_MAX):
                break
            del self._pieces[run_id]
            characters += len(text)
            frame.append(_published(source, text, offset=offset))
        self._characters -= characters
        return frame


def _published(source: TextSource, text: str, *, offset: int) -> state_pb2.PublishedDelta:
    # Half of a pair that a provider cut in two has no encoding; one character stays one, so that offsets hold.
    text = text if text.isascii() else text.encode("utf-8", "replace").decode()
    return state_pb2.PublishedDelta(
        tenant_id=source.tenant_id,
        user_id=source.user_id,
        delta=events_pb2.TextDelta(run_id=source.run_id, step=source.step, offset=offset, text=text),
    )
