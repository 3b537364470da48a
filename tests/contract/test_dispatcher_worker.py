"""The SDK's own worker at real dispatchers: broken networks, restarts, several dispatchers, draining, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from mainspring import diagnostics
from mainspring.errors import WorkerError
from mainspring.tool import Effect, declare, tool
from mainspring.v1 import types_pb2
from mainspring.worker import Worker

from test_framework.grpc_testing import free_address
from test_framework.waiting import wait_until
from tests.contract.dispatcher_calls import OK, PURE, TIMEOUT, UNSAFE, Desk, make_call
from tests.contract.dispatcher_calls import tool as declared
from tests.contract.dispatcher_network import Dispatcher, Network

pytestmark = pytest.mark.contract
grpc_service = "Dispatcher"
grpc_databases = ("Registry",)


class Gate:
    """A tool that waits at a gate, and counts how often it was executed."""

    def __init__(self, effect: Effect = "pure") -> None:
        self.executions = 0
        self.ended = 0
        self.open = asyncio.Event()

        @tool(name="gate", effect=effect, timeout=60)
        async def gate() -> str:
            self.executions += 1
            await self.open.wait()
            self.ended += 1
            return "through"

        self.tool: Callable[[], Any] = gate


@pytest.mark.parametrize(("effect", "name"), [(PURE, "pure"), (UNSAFE, "unsafe")])
async def test_a_call_runs_on_while_the_network_is_cut_and_is_delivered(
    desk: Desk, tenant: str, effect: types_pb2.EffectClass.ValueType, name: Effect
) -> None:
    gate = Gate(name)
    async with Network(desk.address).laid() as network:
        direct, desk.address = desk.address, network.address
        async with desk.worker(gate.tool, tenant=tenant):
            desk.address = direct
            stream = desk.calls()
            ids = await stream.send(make_call("gate", tenant=tenant, effect=effect))
            await wait_until(lambda: gate.executions)
            network.cut()
            network.mend()
            await wait_until(lambda: network.connections == 2)
            gate.open.set()
            (result,) = await stream.outcomes(ids)
    assert (result.status, result.result) == (OK, b'"through"')
    assert gate.executions == 1


async def test_a_call_that_ends_while_the_network_is_cut_is_delivered(desk: Desk, tenant: str) -> None:
    gate = Gate("unsafe")
    async with Network(desk.address).laid() as network:
        direct, desk.address = desk.address, network.address
        async with desk.worker(gate.tool, tenant=tenant):
            desk.address = direct
            stream = desk.calls()
            ids = await stream.send(make_call("gate", tenant=tenant, effect=UNSAFE))
            await wait_until(lambda: gate.executions)
            network.cut()
            gate.open.set()
            await wait_until(lambda: gate.ended)
            network.mend()
            (result,) = await stream.outcomes(ids)
    assert (result.status, result.result, result.attempts) == (OK, b'"through"', 1)


async def test_a_worker_cut_off_for_long_is_replaced_by_another(desk: Desk, tenant: str) -> None:
    near, far = Gate(), Gate()
    near.open.set()
    async with Network(desk.address).laid() as network, AsyncExitStack() as stack:
        direct, desk.address = desk.address, network.address
        await stack.enter_async_context(desk.worker(far.tool, tenant=tenant))
        desk.address = direct
        stream = desk.calls()
        ids = await stream.send(make_call("gate", tenant=tenant))
        await wait_until(lambda: far.executions)
        await stack.enter_async_context(desk.worker(near.tool, tenant=tenant))
        network.cut()
        (result,) = await stream.outcomes(ids)
        assert (result.result, result.attempts, near.executions) == (b'"through"', 2, 1)
        network.mend()
        far.open.set()
        await wait_until(lambda: far.ended)


async def test_a_dispatcher_that_restarts_finds_the_call_still_running(
    desk: Desk, tenant: str, contract_environment: dict[str, Any]
) -> None:
    gate = Gate()
    dispatcher = Dispatcher(contract_environment, free_address())
    await dispatcher.start()
    other = Desk(dispatcher.address, desk.identities)
    try:
        async with other.worker(gate.tool, diagnostics.echo, tenant=tenant):
            call = make_call("gate", tenant=tenant)
            await other.calls().send(call)
            await wait_until(lambda: gate.executions)
            await dispatcher.stop()
            await dispatcher.start()
            stream = other.calls()
            ids = await stream.send(call)
            await stream.ask_one(make_call("diagnostics.echo", tenant=tenant))  # so that the other has arrived too
            gate.open.set()
            (result,) = await stream.outcomes(ids)
        assert (result.status, result.result) == (OK, b'"through"')
        assert gate.executions == 1, "the call that was under way is joined"
    finally:
        await other.close()
        await dispatcher.stop()


async def test_a_worker_serves_every_dispatcher_of_its_target(
    desk: Desk, tenant: str, contract_environment: dict[str, Any]
) -> None:
    gate = Gate()
    gate.open.set()
    second = Dispatcher(contract_environment, free_address())
    await second.start()
    first_address, desk.address = desk.address, f"{desk.address},{second.address}"
    other = Desk(second.address, desk.identities)
    try:
        async with desk.worker(gate.tool, tenant=tenant):
            for place in (desk, other):
                assert (await place.calls().ask_one(make_call("gate", tenant=tenant))).status == OK
    finally:
        desk.address = first_address
        await other.close()
        await second.stop()


async def test_a_worker_that_stops_finishes_what_it_has_and_takes_no_more(desk: Desk, tenant: str) -> None:
    gate = Gate()
    stream = desk.calls()
    async with asyncio.TaskGroup() as tasks:
        stop, ready = asyncio.Event(), asyncio.Event()
        token = identities_token(desk, tenant)
        worker = Worker({"gate": declare(gate.tool)}, target=desk.address, token=token, ready=ready.set)
        running = tasks.create_task(worker.run(stop))
        await ready.wait()
        ids = await stream.send(make_call("gate", tenant=tenant))
        await wait_until(lambda: gate.executions)
        stop.set()
        heir = await desk.attached(declared("gate"), tenant=tenant)
        late = await stream.send(*(make_call("gate", tenant=tenant) for _ in range(3)))
        for _ in late:
            await heir.finish(await heir.next_call(), b'"heir"')
        assert [result.result for result in await stream.outcomes(late)] == [b'"heir"'] * 3
        assert not running.done()
        gate.open.set()
        assert [result.result for result in await stream.outcomes(ids)] == [b'"through"']
    assert gate.executions == 1


async def test_a_worker_in_a_hurry_leaves_its_calls_to_others(desk: Desk, tenant: str) -> None:
    gate = Gate()
    stream = desk.calls()
    async with asyncio.timeout(TIMEOUT), asyncio.TaskGroup() as tasks:
        stop, hurry, ready = asyncio.Event(), asyncio.Event(), asyncio.Event()
        token = identities_token(desk, tenant)
        worker = Worker({"gate": declare(gate.tool)}, target=desk.address, token=token, ready=ready.set)
        tasks.create_task(worker.run(stop, hurry))
        await ready.wait()
        ids = await stream.send(make_call("gate", tenant=tenant))
        await wait_until(lambda: gate.executions)
        heir = await desk.attached(declared("gate"), tenant=tenant)
        stop.set()
        hurry.set()
        await heir.finish(await heir.next_call(), b'"heir"')
        assert [result.result for result in await stream.outcomes(ids)] == [b'"heir"']
    assert gate.ended == 0


@pytest.mark.parametrize("role", ["viewer", "runner"])
async def test_a_worker_that_is_refused_says_why(desk: Desk, tenant: str, role: str) -> None:
    token = desk.identities.token(tenant, "ann", role)
    worker = Worker({"gate": declare(Gate().tool)}, target=desk.address, token=token)
    with pytest.raises(WorkerError, match=rf"PERMISSION_DENIED.*operator.*{role}"):
        await asyncio.wait_for(worker.run(asyncio.Event()), TIMEOUT)


async def test_a_worker_goes_on_with_a_new_token_and_ends_without_one(desk: Desk, tenant: str) -> None:
    """Its stream ends with its token, in mid-call; the call goes on, and is delivered over the next stream."""
    gate = Gate("unsafe")

    def token(seconds: int) -> str:
        return desk.identities.token(tenant, "ann", "operator", ttl_seconds=seconds)

    given: list[str] = []

    def ask() -> str:
        # The second lasts until the call is through, and there is no third.
        given.append(given[-1] if len(given) > 1 else token(3))
        return given[-1]

    attached = asyncio.Event()
    worker = Worker({"gate": declare(gate.tool)}, target=desk.address, token=ask, ready=attached.set)
    running = asyncio.ensure_future(worker.run(asyncio.Event()))
    await asyncio.wait_for(attached.wait(), TIMEOUT)
    stream = desk.calls()
    ids = await stream.send(make_call("gate", tenant=tenant, effect=UNSAFE))
    await wait_until(lambda: len(given) > 1)
    gate.open.set()
    (result,) = await stream.outcomes(ids)
    assert (result.status, gate.executions) == (OK, 1)
    with pytest.raises(WorkerError, match="UNAUTHENTICATED"):
        await asyncio.wait_for(running, TIMEOUT)


async def test_a_worker_whose_tool_changed_its_effect_says_so(desk: Desk, tenant: str) -> None:
    await desk.attached(declared("gate", effect=UNSAFE), tenant=tenant)
    token = identities_token(desk, tenant)
    worker = Worker({"gate": declare(Gate("pure").tool)}, target=desk.address, token=token)
    with pytest.raises(WorkerError, match=r"ALREADY_EXISTS.*gate is registered as unsafe"):
        await asyncio.wait_for(worker.run(asyncio.Event()), TIMEOUT)


async def test_a_worker_waits_for_a_dispatcher_that_is_not_there_yet(
    desk: Desk, tenant: str, contract_environment: dict[str, Any]
) -> None:
    gate = Gate()
    gate.open.set()
    dispatcher = Dispatcher(contract_environment, free_address())
    late = Desk(dispatcher.address, desk.identities)
    try:
        async with asyncio.TaskGroup() as tasks:
            starting = tasks.create_task(dispatcher.start())
            async with late.worker(gate.tool, tenant=tenant):
                await starting
                assert (await late.calls().ask_one(make_call("gate", tenant=tenant))).status == OK
    finally:
        await late.close()
        await dispatcher.stop()


def identities_token(desk: Desk, tenant: str) -> str:
    """An operator's token."""
    return desk.identities.token(tenant, "ann", "operator")
