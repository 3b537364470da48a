"""Which appends are committed together, and how a refused batch is divided."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring_kit.errors import MainspringError
from mainspring_state.core.append import Entry
from mainspring_state.core.backlog import BATCH_ITEMS_MAX, Backlog, halves

from tests.unit.state.samples import entry

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Queued:
    """An entry with a name to tell it by."""

    entry: Entry
    name: str


def backlog_of(*queued: Queued) -> Backlog[Queued]:
    backlog: Backlog[Queued] = Backlog(items_max=10_000, bytes_max=1 << 30)
    for one in queued:
        backlog.add(one)
    return backlog


def batches(backlog: Backlog[Queued]) -> list[list[str]]:
    found = []
    while len(backlog):
        found.append([one.name for one in backlog.take()])
    return found


def test_two_appends_of_a_run_go_one_after_the_other() -> None:
    backlog = backlog_of(
        Queued(entry(1), "create"), Queued(entry(1, seq=2), "second"), Queued(entry(1, seq=3), "third")
    )
    assert batches(backlog) == [["create"], ["second"], ["third"]]


def test_two_creates_of_a_session_go_one_after_the_other() -> None:
    backlog = backlog_of(Queued(entry(1, session_id="s"), "a"), Queued(entry(2, session_id="s"), "b"))
    assert batches(backlog) == [["a"], ["b"]]


def test_two_creates_with_one_key_go_one_after_the_other() -> None:
    backlog = backlog_of(Queued(entry(1, key="k"), "a"), Queued(entry(2, key="k"), "b"), Queued(entry(3), "c"))
    assert batches(backlog) == [["a", "c"], ["b"]]


def test_what_waits_holds_back_what_follows_it() -> None:
    # The second create waits for its session, so its run's next append must wait for it, not overtake.
    backlog = backlog_of(
        Queued(entry(1, session_id="s"), "a"),
        Queued(entry(2, session_id="s"), "b"),
        Queued(entry(2, seq=2), "b2"),
        Queued(entry(3), "c"),
    )
    assert batches(backlog) == [["a", "c"], ["b"], ["b2"]]


def test_a_batch_is_bounded() -> None:
    backlog = backlog_of(*(Queued(entry(number), str(number)) for number in range(BATCH_ITEMS_MAX + 3)))
    assert [len(batch) for batch in batches(backlog)] == [BATCH_ITEMS_MAX, 3]


def test_the_queue_is_bounded_in_items_and_in_bytes() -> None:
    by_items: Backlog[Queued] = Backlog(items_max=1, bytes_max=1 << 30)
    by_items.add(Queued(entry(1), "a"))
    by_bytes: Backlog[Queued] = Backlog(items_max=100, bytes_max=entry(1).size_bytes)
    by_bytes.add(Queued(entry(1), "a"))
    for backlog in (by_items, by_bytes):
        with pytest.raises(MainspringError) as raised:
            backlog.add(Queued(entry(2), "b"))
        assert raised.value.reason_name == "QUEUE_FULL"
        assert raised.value.retry_after_seconds is not None
        backlog.take()
        backlog.add(Queued(entry(2), "b"))


def test_a_stale_append_takes_its_successors_with_it_but_not_a_later_holders() -> None:
    failed = entry(1, seq=2, epoch=1)
    backlog = backlog_of(
        Queued(entry(1, seq=3, epoch=1), "successor"),
        Queued(entry(1, seq=3, epoch=2), "new holder"),
        Queued(entry(2, seq=3, epoch=1), "other run"),
    )
    assert [one.name for one in backlog.drop_successors(failed)] == ["successor"]
    assert batches(backlog) == [["new holder", "other run"]]
    assert backlog.drop_successors(failed) == []


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), max_size=40), st.integers(1, 4))
def test_every_run_keeps_its_order_and_nothing_is_lost(asked: list[tuple[int, int]], key_count: int) -> None:
    queued, seqs = [], dict.fromkeys(range(1, 6), 0)
    for position, (run, session) in enumerate(asked):
        seqs[run] += 1
        made = entry(run, session_id=f"s{session}") if seqs[run] == 1 else entry(run, seq=seqs[run])
        queued.append(Queued(made, f"{run}:{position}"))
    found = batches(backlog_of(*queued))
    assert sorted(name for batch in found for name in batch) == sorted(one.name for one in queued)
    for run in range(1, 6):
        names = [name for batch in found for name in batch if name.startswith(f"{run}:")]
        assert names == [one.name for one in queued if one.name.startswith(f"{run}:")]
        assert all(sum(name.startswith(f"{run}:") for name in batch) <= 1 for batch in found)


@pytest.mark.parametrize("size", [2, 3, 8, 511])
def test_halves_are_a_division(size: int) -> None:
    batch = [Queued(entry(number), str(number)) for number in range(size)]
    left, right = halves(batch)
    assert left + right == batch
    assert left and right
