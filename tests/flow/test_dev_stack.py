"""`mainspring.dev.stack` as tests and benchmarks use it: replicas, trouble on purpose, and errors that say why."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import yaml
from mainspring import Client
from mainspring.dev import StartError, stack
from mainspring.dev.witness import Silent
from mainspring.embedded import postgres, valkey

from test_framework.waiting import wait_until
from tests.flow.supervising import Record, lives, supervised

LOOKUP = yaml.safe_load((Path(__file__).parents[2] / "examples" / "lookup" / "agent.yaml").read_text())
SLOW = {
    **LOOKUP,
    "name": "slow",
    "model": {
        "provider": "scripted",
        "script": [
            {"text": "One.", "calls": [{"tool": "diagnostics.sleep", "arguments": {"seconds": 3}}]},
            {"text": "Two.", "result": {"done": True}},
        ],
    },
    "tools": ["diagnostics.sleep"],
}

pytestmark = pytest.mark.timeout(180)


async def test_replicas_serve_and_what_is_killed_or_stopped_comes_back_with_all_data(tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    async with stack(data_dir=tmp_path / "data", replicas={"state": 2, "gateway": 2}, ready_file=ready_file) as running:
        assert len(running.gateways) == 2
        assert len(running.services["state"].split(",")) == 2
        assert {name: len(pids) for name, pids in running.pids.items()} == {
            "redis": 1,
            "postgres": 1,
            "registry": 1,
            "dispatcher": 1,
            "execution": 1,
            "state": 2,
            "gateway": 2,
            "worker": 1,
        }
        assert json.loads(ready_file.read_text())["pids"] == running.pids
        async with Client(running.gateways[1], running.mint(user="ann")) as client:
            await client.apply(LOOKUP)
            ended = await client.run("lookup", {"value": 42})
            assert ended.data["result"] == {"answer": 42}
            log = [event.frame async for event in client.events(ended.run_id)]
            for name, index in (("postgres", 0), ("redis", 0), ("state", 1), ("gateway", 1)):
                before = running.pids[name][index]
                await running.kill(name, index=index)
                assert not lives(before)
                await running.wait_ready()
                assert running.pids[name][index] != before
            # The client comes back by itself.
            assert [event.frame async for event in client.follow(ended.run_id)] == log
            await running.restart("state", index=0)
            await running.stop("redis")
            assert "redis" not in running.pids
            with pytest.raises(TimeoutError, match="do not serve: redis"):
                await running.wait_ready(timeout=0.1)
            assert (await client.run("lookup", {"value": 43})).data["result"] == {"answer": 43}
            await running.start("redis")
        with pytest.raises(LookupError, match=r"no process state 2; it has .*state\.0, state\.1"):
            await running.kill("state", index=2)
        pids = [pid for found in running.pids.values() for pid in found]
    assert not any(map(lives, pids))
    assert not ready_file.exists()


async def test_a_client_whose_gateway_dies_sees_every_event_once_and_starts_nothing_twice() -> None:
    async with stack() as running, Client(running.gateway, running.token) as client:
        await client.apply(SLOW)
        seen = []
        async for event in client.stream("slow", session_id="s", idempotency_key="once"):
            seen.append(event.frame)
            if event.type == "tool_executing":
                await running.kill("gateway")
        assert [frame["seq"] for frame in seen] == list(range(1, len(seen) + 1))
        assert seen[-1]["data"]["result"] == {"done": True}
        # The same start again is the same run, from its first event.
        assert [event.frame async for event in client.stream("slow", session_id="s", idempotency_key="once")] == seen
        assert len((await client.list_runs(session_id="s"))["runs"]) == 1
        run_id = seen[0]["run_id"]
        assert [event.frame async for event in client.follow(run_id, after_seq=2)] == seen[2:]
        assert [event.frame async for event in client.follow(run_id, after_seq=len(seen))] == []


async def test_servers_that_are_named_are_used_instead_of_the_embedded_ones(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sockets = tmp_path_factory.mktemp("s")
    data, log = tmp_path / "postgres", tmp_path / "server.log"
    await postgres.initialize(data)
    async with (
        supervised(postgres.launch(data, sockets, log=log), Record()) as database,
        supervised(valkey.launch(tmp_path, sockets / "valkey.sock", log=log), Record()) as cache,
    ):
        await database.serving.wait()
        await cache.serving.wait()
        database_url, redis_url = postgres.url(sockets), valkey.url(sockets / "valkey.sock")
        async with stack(data_dir=tmp_path / "data", database_url=database_url, redis_url=redis_url) as running:
            assert not {"postgres", "redis"} & set(running.pids)
            assert running.database_url == database_url
            async with Client(running.gateway, running.token) as client:
                await client.apply(LOOKUP)
                assert (await client.run("lookup", {"value": 1})).data["result"] == {"answer": 1}
        assert database.pid is not None
        assert not running.folder.postgres.exists()


async def test_a_stack_of_its_own_folder_leaves_none_and_passes_errors_on_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        async with stack(workers=None) as running:
            folder = running.folder.path
            assert "worker" not in running.pids
            raise ZeroDivisionError
    assert not folder.exists()


async def test_a_setting_that_is_wrong_ends_the_start_and_is_named() -> None:
    with pytest.raises(StartError, match=r"ended with exit code 2 before it served(.|\n)*MAINSPRING_DRAIN_SECONDS"):
        async with stack(extra_env={"MAINSPRING_DRAIN_SECONDS": "long"}):
            pass


async def test_a_start_that_is_cancelled_leaves_nothing_running(tmp_path: Path) -> None:
    async def start() -> None:
        async with stack(data_dir=tmp_path):
            pass

    task = asyncio.ensure_future(start())
    noted = tmp_path / "pids.json"
    await wait_until(noted.exists, what="a first process")
    pids = [int(pid) for pid in json.loads(noted.read_text())]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(map(lives, pids))


async def test_a_stopped_process_gets_its_signal_first() -> None:
    async with stack(workers=None) as running:
        [pid] = running.pids["dispatcher"]
        await running.kill("dispatcher", signal=signal.SIGTERM)
        assert not lives(pid)
        await running.wait_ready()
        assert running.pids["dispatcher"] != [pid]
        assert '"event":"process_stopped"' in running.log("dispatcher").read_text()


async def test_a_ready_file_that_a_killed_one_left_is_gone_before_anything_starts(tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    ready_file.write_text('{"gateway": "http://127.0.0.1:9"}')
    seen: list[bool] = []

    class Onlooker(Silent):
        def step(self, what: str) -> AbstractContextManager[None]:
            seen.append(ready_file.exists())
            return super().step(what)

    nowhere = "postgresql://postgres@127.0.0.1:9/x"
    with pytest.raises(StartError, match="migration"):
        async with stack(data_dir=tmp_path / "data", database_url=nowhere, ready_file=ready_file, witness=Onlooker()):
            pass
    assert set(seen) == {False}
