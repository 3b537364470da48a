"""A supervised process, real and small: it is started again when it dies, and stopped with whoever supervises it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from mainspring.embedded.launch import Launch, StartError

from test_framework.waiting import wait_until
from tests.flow.supervising import Record, supervised

SERVES = ("/bin/sh", "-c", "echo up; exec sleep 60")


async def at_once(_pid: int) -> None:
    """Serves as soon as it runs."""


def launch(
    tmp_path: Path,
    argv: tuple[str, ...] = SERVES,
    *,
    ready: Callable[[int], Awaitable[None]] = at_once,
) -> Launch:
    return Launch(name="thing", argv=argv, log=tmp_path / "thing.log", ready=ready)


async def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    record = Record()
    async with supervised(launch(tmp_path), record) as child:
        await child.serving.wait()
        await child.signal(signal.SIGKILL)
        assert not child.serving.is_set()
        await asyncio.wait_for(child.serving.wait(), 5)
        assert len(record.starts) == 2
        assert record.ends == [(-signal.SIGKILL, 0.0)]
        assert child.pid == record.starts[1]
    assert child.pid is None
    assert not psutil.pid_exists(record.starts[1])


async def test_a_process_that_keeps_dying_is_started_ever_later(tmp_path: Path) -> None:
    record = Record()
    async with supervised(launch(tmp_path, ("/bin/sh", "-c", "sleep 0.1; exit 3")), record):
        await wait_until(lambda: len(record.ends) == 3, what="three deaths")
    assert record.ends == [(3, 0.0), (3, 0.5), (3, 1.0)]


async def test_a_process_that_dies_before_it_serves_ends_the_start_with_its_last_words(tmp_path: Path) -> None:
    async def never(_pid: int) -> None:
        await asyncio.Event().wait()

    what = launch(tmp_path, ("/bin/sh", "-c", "echo the port is taken >&2; exit 2"), ready=never)
    with pytest.raises(ExceptionGroup) as told:
        async with supervised(what, Record()) as child:
            await child.serving.wait()
    [error] = told.value.exceptions
    assert isinstance(error, StartError)
    assert "thing ended with exit code 2 before it served" in str(error)
    assert "the port is taken" in str(error)


async def test_a_process_that_never_serves_ends_the_start(tmp_path: Path) -> None:
    async def late(_pid: int) -> None:
        raise TimeoutError

    with pytest.raises(ExceptionGroup) as told:
        async with supervised(launch(tmp_path, ready=late), Record()) as child:
            await child.serving.wait()
    assert told.group_contains(StartError, match="runs but does not serve")
    assert child.pid is None


async def test_a_stopped_process_stays_down_until_it_is_wanted_again(tmp_path: Path) -> None:
    record = Record()
    async with supervised(launch(tmp_path), record) as child:
        await child.serving.wait()
        await child.stop()
        assert not child.serving.is_set()
        assert child.pid is None
        child.resume()
        await asyncio.wait_for(child.serving.wait(), 5)
    assert len(record.starts) == 2
    assert record.ends == []


async def test_a_process_that_ignores_its_stop_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"trap '' TERM; touch {ready}; while :; do sleep 1; done"
    async with supervised(launch(tmp_path, ("/bin/sh", "-c", script)), Record()) as child:
        await wait_until(ready.exists, what="a process that ignores SIGTERM")
        process = child.process
        assert process is not None
        await child.stop(seconds=0.2)
        assert process.returncode == -signal.SIGKILL
