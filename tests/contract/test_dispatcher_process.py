"""The dispatcher and workers as processes: killed, stopped, started again, with calls under way."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mainspring.v1 import types_pb2

from test_framework.grpc_testing import free_address
from test_framework.identities import Identities, unique
from test_framework.waiting import wait_until
from tests.contract.dispatcher_calls import OK, TIMEOUT, Desk, make_call

pytestmark = pytest.mark.contract
grpc_service = "Dispatcher"
grpc_databases = ("Registry",)

KEYED = types_pb2.EFFECT_CLASS_KEYED
START_SECONDS = 30
Process = asyncio.subprocess.Process


class Processes:
    """Real processes, beside the registry in this one; all are gone in the end."""

    def __init__(self, environment: dict[str, Any], identities: Identities, folder: Path) -> None:  # Any: settings
        self.identities = identities
        self.address = free_address()
        self.folder = folder
        self._environment = {
            **os.environ,
            "MAINSPRING_ENVIRONMENT": "development",
            "MAINSPRING_AUTH_SECRET": environment["auth_secret"],
            "MAINSPRING_SERVICE_SECRET": environment["service_secret"],
            "MAINSPRING_REGISTRY_TARGET": environment["registry_target"],
            "MAINSPRING_DISPATCHER_TARGET": self.address,
            "MAINSPRING_LISTEN": self.address,
            "MAINSPRING_TOKEN": str(identities.service_metadata()[0][1]).removeprefix("Bearer "),
        }
        self._started: list[Process] = []

    async def dispatcher(self) -> Process:
        """Starts the dispatcher and waits until it is ready."""
        process = await self.start("-m", "mainspring_dispatcher", "serve")
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # Any: the package ships no types
            request = health_pb2.HealthCheckRequest(service="readiness")

            async def ready() -> bool:
                answer = await stub.Check(request, timeout=TIMEOUT, wait_for_ready=True)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            await wait_until(ready, START_SECONDS)
        return process

    async def worker(self, *modules: str, **environment: str) -> Process:
        """Starts a worker and waits until it is attached."""
        ready = self.folder / unique("ready")
        process = await self.start_worker("--ready-file", str(ready), *modules, **environment)
        await wait_until(lambda: ready.exists() and ready.read_text() == str(process.pid), START_SECONDS)
        return process

    async def start_worker(self, *arguments: str, **environment: str) -> Process:
        """Starts a worker."""
        return await self.start("-m", "mainspring", "worker", *arguments, **environment)

    async def start(self, *arguments: str, **environment: str) -> Process:
        """Starts a Python process."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            env={**self._environment, **environment},
            cwd=self.folder,
            stderr=asyncio.subprocess.PIPE,
        )
        self._started.append(process)
        return process

    async def close(self) -> None:
        """Kills what is left."""
        for process in self._started:
            if process.returncode is None:
                process.kill()
            await process.communicate()


@pytest.fixture
async def processes(
    grpc_server: object,
    grpc_stub: object,
    contract_environment: dict[str, Any],
    identities: Identities,
    tmp_path: Path,
) -> AsyncIterator[Processes]:
    found = Processes(contract_environment, identities, tmp_path)
    yield found
    await found.close()


@asynccontextmanager
async def desk_at(processes: Processes) -> AsyncIterator[Desk]:
    desk = Desk(processes.address, processes.identities)
    try:
        yield desk
    finally:
        await desk.close()


async def ended(process: Process) -> tuple[int | None, str]:
    """The exit code and what was said on standard error."""
    async with asyncio.timeout(START_SECONDS):
        _, said = await process.communicate()
    return process.returncode, said.decode()


async def test_a_killed_workers_calls_are_finished_by_another_and_each_key_counts_once(processes: Processes) -> None:
    await processes.dispatcher()
    workers = [await processes.worker("mainspring.diagnostics") for _ in range(2)]
    tenant, effects = unique("tenant"), processes.folder / "effects"
    async with desk_at(processes) as desk:
        stream = desk.calls()
        arguments = orjson.dumps({"file": str(effects)})
        counts = [make_call("diagnostics.count", tenant=tenant, arguments=arguments, effect=KEYED) for _ in range(200)]
        naps = [make_call("diagnostics.sleep", tenant=tenant, arguments=b'{"seconds": 1}') for _ in range(20)]
        ids = await stream.send(*naps, *counts)
        await wait_until(effects.exists)
        workers[0].kill()
        results = await stream.outcomes(ids)
    assert {result.status for result in results} == {OK}
    assert max(result.attempts for result in results) == 2, "some were in the killed worker"
    lines = Counter(effects.read_text().splitlines())
    assert lines == Counter(f"diagnostics.count {call.call_id}" for call in counts)


async def test_a_worker_that_is_stopped_finishes_its_calls(processes: Processes) -> None:
    await processes.dispatcher()
    worker = await processes.worker("mainspring.diagnostics")
    async with desk_at(processes) as desk:
        stream = desk.calls()
        ids = await stream.send(
            make_call("diagnostics.sleep", tenant=unique("tenant"), arguments=b'{"seconds": 1}'),
            make_call("diagnostics.echo", tenant=unique("tenant")),
        )
        await stream.outcomes(ids[1:])
        worker.terminate()
        assert [(result.status, result.attempts) for result in await stream.outcomes(ids)] == [(OK, 1), (OK, 1)]
    assert (await ended(worker))[0] == 0


async def test_a_dispatcher_that_is_stopped_answers_what_is_under_way(processes: Processes) -> None:
    dispatcher = await processes.dispatcher()
    worker = await processes.worker("mainspring.diagnostics")
    async with desk_at(processes) as desk:
        stream = desk.calls()
        ids = await stream.send(
            make_call("diagnostics.sleep", tenant=unique("tenant"), arguments=b'{"seconds": 0.5}'),
            make_call("diagnostics.echo", tenant=unique("tenant")),
        )
        await stream.outcomes(ids[1:])
        dispatcher.terminate()
        assert [result.status for result in await stream.outcomes(ids)] == [OK, OK]
    code, said = await ended(dispatcher)
    assert (code, "process_stopped" in said) == (0, True)
    await processes.dispatcher()
    async with desk_at(processes) as desk:
        result = await desk.calls().ask_one(make_call("diagnostics.echo", tenant=unique("tenant")))
        assert result.status == OK, "the worker has come back by itself"
    assert worker.returncode is None


async def test_a_killed_dispatcher_loses_no_call_that_is_sent_again(processes: Processes) -> None:
    dispatcher = await processes.dispatcher()
    await processes.worker("mainspring.diagnostics")
    nap = make_call("diagnostics.sleep", tenant=unique("tenant"), arguments=b'{"seconds": 3}')
    async with desk_at(processes) as desk:
        stream = desk.calls()
        await stream.send(nap)
        await stream.ask_one(make_call("diagnostics.echo", tenant=unique("tenant")))
        dispatcher.send_signal(signal.SIGKILL)
        await ended(dispatcher)
    await processes.dispatcher()
    async with desk_at(processes) as desk:
        result = await desk.calls().ask_one(nap)
    assert result.status == OK


async def test_a_frozen_worker_is_replaced(processes: Processes) -> None:
    await processes.dispatcher()
    frozen = await processes.worker("mainspring.diagnostics")
    async with desk_at(processes) as desk:
        stream = desk.calls()
        frozen.send_signal(signal.SIGSTOP)
        ids = await stream.send(make_call("diagnostics.echo", tenant=unique("tenant")))
        await processes.worker("mainspring.diagnostics")
        (result,) = await stream.outcomes(ids)
        frozen.send_signal(signal.SIGCONT)
    assert (result.status, result.attempts) == (OK, 2)


@pytest.mark.parametrize(
    ("module", "environment", "words"),
    [
        ("no_such_module", {}, ["There is no module no_such_module"]),
        ("json", {}, ["json has no tool", "@tool"]),
        ("mainspring.diagnostics", {"MAINSPRING_ENVIRONMENT": "production"}, ["serves development only"]),
    ],
)
async def test_a_worker_that_cannot_serve_says_why_and_ends_with_1(
    processes: Processes, module: str, environment: dict[str, str], words: list[str]
) -> None:
    code, said = await ended(await processes.start_worker(module, **environment))
    assert code == 1
    assert all(word in said for word in words), said
    assert "Traceback" not in said


async def test_a_refused_worker_ends_with_1(processes: Processes) -> None:
    await processes.dispatcher()
    token = processes.identities.token(unique("tenant"), "ann", "viewer")
    code, said = await ended(await processes.start_worker("mainspring.diagnostics", MAINSPRING_TOKEN=token))
    assert code == 1
    assert "PERMISSION_DENIED" in said
    assert "Traceback" not in said


async def test_a_dispatcher_with_bad_settings_lists_every_fault_and_ends_with_2(processes: Processes) -> None:
    wrong = {"MAINSPRING_REGISTRY_TARGET": "", "MAINSPRING_WORKERS_MAX": "none", "MAINSPRING_AUTH_SECRET": "short"}
    code, said = await ended(await processes.start("-m", "mainspring_dispatcher", **wrong))
    assert code == 2
    assert all(name in said for name in wrong)
