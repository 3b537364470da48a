"""One watcher's view of one run: what it has seen, and what it must not see twice or before its time. Does no I/O."""

from __future__ import annotations

from typing import Final, Protocol

from mainspring_kit.errors import MainspringError

from mainspring_gateway.core.drafts import Draft
from mainspring_gateway.core.events import EncodedEvent
from mainspring_gateway.core.frames import FrameId

# Live events that a follow keeps while the log before them is being read; beyond, they are read from the log, too.
_HELD_EVENTS_MAX: Final = 256


class Watcher(Protocol):
    """Who sees events: a socket or an HTTP stream. It never waits."""

    def show(self, event: EncodedEvent) -> None:
        """Takes the next event of a run that it follows."""

    def show_text(self, follow: Follow) -> None:
        """There is more of the run's unfinished text, to be had of the follow's `take_text` for a while."""

    def branch(self, parent: Follow, run_id: str) -> None:
        """The run that it follows has started a run of its own, or is about to."""

    def end(self, follow: Follow, error: MainspringError | None) -> None:
        """The follow is over: its terminal event was shown, or it failed."""


class Follow:
    """One watcher's view of one run. `sent_seq` is the last event it was shown, or began after.

    It `is_over` when nothing more is shown, and `has_ended` when that is because the run's terminal event was.
    """

    __slots__ = (
        "_draft",
        "_held",
        "_shown_characters",
        "frame_id",
        "has_ended",
        "is_over",
        "run_id",
        "sent_seq",
        "step",
        "tenant_id",
        "user_id",
        "watcher",
    )

    def __init__(self, watcher: Watcher, run: RunOwner, *, frame_id: FrameId = None, after_seq: int = 0) -> None:
        self.watcher = watcher
        self.run_id = run.run_id
        self.tenant_id = run.tenant_id
        self.user_id = run.user_id
        self.frame_id = frame_id
        self.sent_seq = after_seq
        # The last model step whose end it was shown.
        self.step = 0
        self.is_over = False
        self.has_ended = False
        self._held: list[EncodedEvent] | None = None
        self._draft: Draft | None = None
        self._shown_characters = 0

    def show(self, event: EncodedEvent) -> None:
        """Shows the event if it is the next one, or keeps it while the log is being read."""
        if self._held is not None:
            if len(self._held) < _HELD_EVENTS_MAX:
                self._held.append(event)
        elif event.seq == self.sent_seq + 1 and not self.is_over:
            self.replay(event)

    def replay(self, event: EncodedEvent) -> None:
        """Shows an event from the log."""
        if event.seq <= self.sent_seq or self.is_over:
            return
        self.sent_seq = event.seq
        self.step = event.step or self.step
        self.watcher.show(event)
        if event.sub_run_id:
            self.watcher.branch(self, event.sub_run_id)
        if event.is_terminal:
            self.end(None)

    def show_text(self, draft: Draft) -> None:
        """Offers the watcher what it has not seen of the draft; while the log is being read it is shown no text."""
        if self._held is not None or self.is_over:
            return
        if draft is not self._draft:
            self._draft, self._shown_characters = draft, 0
        self.watcher.show_text(self)

    def take_text(self) -> bytes:
        """The next frame of unfinished text; empty when there is none."""
        if self._draft is None or self.is_over:
            return b""
        frame, self._shown_characters = self._draft.frame(self._shown_characters)
        return frame

    def end(self, error: MainspringError | None) -> None:
        """Ends the follow, once."""
        if not self.is_over:
            self.is_over, self.has_ended = True, error is None
            self.watcher.end(self, error)

    def hold(self) -> None:
        """Keeps live events until `release`."""
        self._held = []

    def release(self) -> None:
        """Shows what was kept and follows on; a hole in it is the caller's to see by `sent_seq`."""
        held, self._held = self._held or [], None
        for event in held:
            self.show(event)


class RunOwner(Protocol):
    """A run and whose it is."""

    @property
    def run_id(self) -> str: ...

    @property
    def tenant_id(self) -> str: ...

    @property
    def user_id(self) -> str: ...
