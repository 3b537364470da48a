"""Which appends are committed next: the queue in front of the committer, and how a refused batch is divided."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, Generic, Protocol, TypeVar

from mainspring_kit.errors import MainspringError, Reason

from mainspring_state.core.append import Entry

BATCH_ITEMS_MAX: Final = 512
BATCH_BYTES_MAX: Final = 24 << 20


class Holds(Protocol):
    """What waits in the queue: an entry and whatever its owner needs to answer it."""

    @property
    def entry(self) -> Entry: ...


Waiting = TypeVar("Waiting", bound=Holds)


class Backlog(Generic[Waiting]):
    """A bounded queue of appends, in order for each run, session and idempotency key."""

    def __init__(self, *, items_max: int, bytes_max: int) -> None:
        self._items_max = items_max
        self._bytes_max = bytes_max
        self._queue: deque[Waiting] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, waiting: Waiting) -> None:
        """Queues an append; QUEUE_FULL at the bound."""
        size = waiting.entry.size_bytes
        if len(self._queue) >= self._items_max or (self._queue and self._bytes + size > self._bytes_max):
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"{len(self._queue)} appends with {self._bytes} bytes wait for the database: wait and send it again.",
                queue="appends",
                limit=self._items_max,
            )
        self._queue.append(waiting)
        self._bytes += size

    def take(self) -> list[Waiting]:
        """The next batch: no run, session or idempotency key twice; what must wait for another keeps its place."""
        taken: list[Waiting] = []
        held: list[Waiting] = []
        seen: set[tuple[str, ...]] = set()
        size = 0
        while self._queue and len(taken) < BATCH_ITEMS_MAX and (not taken or size < BATCH_BYTES_MAX):
            waiting = self._queue.popleft()
            keys = _keys(waiting.entry)
            if seen.isdisjoint(keys):
                taken.append(waiting)
                size += waiting.entry.size_bytes
            else:
                held.append(waiting)
            seen.update(keys)
        self._queue.extendleft(reversed(held))
        self._bytes -= size
        return taken

    def drop_successors(self, entry: Entry) -> list[Waiting]:
        """Takes out what its holder queued behind a stale append; a later holder's appends stay."""
        dropped = [waiting for waiting in self._queue if _succeeds(waiting.entry, entry)]
        if dropped:
            self._queue = deque(waiting for waiting in self._queue if not _succeeds(waiting.entry, entry))
            self._bytes -= sum(waiting.entry.size_bytes for waiting in dropped)
        return dropped


def halves(batch: Sequence[Waiting]) -> tuple[list[Waiting], list[Waiting]]:
    """Divides a batch that was refused as a whole, so that only the append at fault fails in the end."""
    middle = len(batch) // 2
    return list(batch[:middle]), list(batch[middle:])


def _succeeds(entry: Entry, failed: Entry) -> bool:
    return entry.run_key == failed.run_key and entry.append.epoch <= failed.append.epoch


def _keys(entry: Entry) -> list[tuple[str, ...]]:
    """What two appends of one batch may not share. Of different lengths, so that no two kinds are equal."""
    append = entry.append
    keys: list[tuple[str, ...]] = [entry.run_key]
    if entry.is_create:
        create = append.create
        keys.append((append.tenant_id, create.user_id, create.session_id))
        if create.idempotency_key:
            keys.append((append.tenant_id, create.user_id, create.idempotency_key, "key"))
    return keys
