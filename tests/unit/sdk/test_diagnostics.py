"""The diagnostic tools do what tests rely on: `count` above all counts each key once, whoever dies."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from mainspring import diagnostics
from mainspring.errors import ToolError
from mainspring.tool import ToolContext, declare

pytestmark = pytest.mark.unit


def context(call_id: str = "c1", run_id: str = "run") -> ToolContext:
    return ToolContext("acme", "ann", "s", run_id, "q", "", 0, (), "", None, call_id, 1)


async def test_echo_returns_its_arguments() -> None:
    assert await diagnostics.echo(a=1, b=[None]) == {"a": 1, "b": [None]}


async def test_sleep_waits() -> None:
    assert await diagnostics.sleep(0) == {"seconds": 0}


async def test_fail_fails_as_often_in_a_run_as_told_and_then_succeeds() -> None:
    for _ in range(2):
        with pytest.raises(ToolError) as raised:
            await diagnostics.fail(context(run_id="twice"), code="UNAVAILABLE", message="m", times=2)
        assert (raised.value.code, raised.value.message) == ("UNAVAILABLE", "m")
    assert await diagnostics.fail(context(run_id="twice"), times=2) == {"failed": 2}
    with pytest.raises(ToolError):
        await diagnostics.fail(context(run_id="another"), times=1)


async def test_fail_without_a_number_always_fails() -> None:
    for _ in range(3):
        with pytest.raises(ToolError):
            await diagnostics.fail(context(run_id="always"))


def test_count_appends_a_line_per_key(tmp_path: Path) -> None:
    path = tmp_path / "effects"
    for call_id in ("c1", "c2", "c1"):
        answer = diagnostics.count(str(path), context(call_id), name="drill")
        assert answer == {"name": "drill", "call_id": call_id}
    assert path.read_text() == "drill c1\ndrill c2\n"


def test_count_takes_back_half_a_line_of_a_process_that_died(tmp_path: Path) -> None:
    path = tmp_path / "effects"
    path.write_text("drill c1\ndrill c")
    diagnostics.count(str(path), context("c2"), name="drill")
    assert path.read_text() == "drill c1\ndrill c2\n"


def test_count_is_not_fooled_by_a_key_that_begins_like_another(tmp_path: Path) -> None:
    path = tmp_path / "effects"
    diagnostics.count(str(path), context("c10"), name="drill")
    diagnostics.count(str(path), context("c1"), name="drill")
    assert path.read_text() == "drill c10\ndrill c1\n"


def _count_many(path: str, together: Barrier) -> None:
    together.wait(60)
    for number in range(100):
        diagnostics.count(path, context(f"c{number}"))


def test_count_counts_once_over_processes(tmp_path: Path) -> None:
    path = tmp_path / "effects"
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(3)
    processes = [spawn.Process(target=_count_many, args=(str(path), together)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(f"diagnostics.count c{number}" for number in range(100))


@pytest.mark.parametrize(
    ("function", "effect"),
    [
        (diagnostics.echo, "pure"),
        (diagnostics.sleep, "pure"),
        (diagnostics.fail, "pure"),
        (diagnostics.count, "keyed"),
    ],
)
def test_their_effect_classes_are_what_the_log_relies_on(function: Callable[..., Any], effect: str) -> None:
    assert declare(function).effect == effect
