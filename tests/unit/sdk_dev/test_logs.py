"""The logs of a stack's processes: read for people, followed line by line, kept small."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from mainspring.dev import logs
from mainspring.dev.logs import LogLine, follow, parse, trim
from mainspring.dev.screen import render

from test_framework.waiting import wait_until


def test_a_json_line_is_read_as_its_process_meant_it() -> None:
    line = parse(
        "state.1",
        '{"event":"lease_lost","level":"warning","timestamp":"2026-11-24T10:00:00Z","service":"state",'
        '"instance":"ab","run_id":"r1","exception":"Traceback"}',
    )
    assert (line.level, line.text, line.fields, line.detail) == ("warning", "lease_lost", {"run_id": "r1"}, "Traceback")
    assert render(line).plain.startswith("state.1      ")
    assert render(line).plain.endswith("warning lease_lost run_id=r1 Traceback")


@pytest.mark.parametrize(
    ("label", "line", "level"),
    [
        ("postgres", "2026-11-24 10:00:00.000 UTC [1] LOG:  checkpoint starting", "info"),
        ("postgres", "2026-11-24 10:00:00.000 UTC [1] FATAL:  out of disk", "error"),
        ("redis", "1:M 24 Nov 2026 # WARNING Memory overcommit must be enabled!", "info"),
        ("state", "Traceback (most recent call last):", "warning"),
        ("state", "", "debug"),
        ("state", '["not", "an", "event"]', "warning"),
        ("state", '{"event": "x", "level": "strange"}', "info"),
    ],
)
def test_every_line_has_a_level(label: str, line: str, level: str) -> None:
    assert parse(label, line).level == level


def test_only_what_is_grave_enough_reaches_a_level() -> None:
    assert LogLine("a", "warning", "", "x").reaches("warning")
    assert not LogLine("a", "info", "", "x").reaches("warning")


async def test_new_lines_are_followed_whole_and_old_ones_are_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "state.log"
    path.write_text("before\n")
    seen: list[str] = []

    async def collect() -> None:
        async with aclosing(follow(tmp_path)) as lines:  # type: ignore[type-var]  # an async generator
            async for line in lines:
                seen.append(f"{line.label}: {line.text}")

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(collect())
        await asyncio.sleep(0)
        with path.open("a") as file:
            file.write("one\ntw")
            file.flush()
            (tmp_path / "gateway.log").write_text("first\n")
            await wait_until(lambda: len(seen) == 2, what="two whole lines")
            file.write("o\n")
        await wait_until(lambda: len(seen) == 3, what="the line that was cut")
        with path.open("a") as file:
            file.write("thr")
            file.flush()
            # Read in the same pass, after state.log.
            (tmp_path / "worker.log").write_text("between\n")
            await wait_until(lambda: seen[3:] == ["worker: between"], what="a pass over both")
            file.write("ee\n")
        await wait_until(lambda: seen[4:] == ["state: three"], what="the line that was written in two parts")
        path.write_text("after\n")
        await wait_until(lambda: len(seen) == 6, what="the line after the log was emptied")
        task.cancel()
    assert sorted(seen[:2]) == ["gateway: first", "state: one"]
    assert (seen[2], seen[5]) == ("state: two", "state: after")


async def test_a_large_log_is_moved_aside_under_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "state.log"
    with path.open("ab") as writer:
        writer.write(b"x" * (logs.LOG_BYTES_MAX + 1))
        writer.flush()
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(trim(tmp_path))
            await wait_until(lambda: path.stat().st_size == 0, what="an empty log")
            task.cancel()
        writer.write(b"and on\n")
    assert path.read_bytes() == b"and on\n"
    assert path.with_suffix(".old").stat().st_size == logs.LOG_BYTES_MAX + 1
