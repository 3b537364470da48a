"""One world: a database, a bus, and the processes of the platform, each the product's own engine on simulated wires."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any, Final, cast

import asyncpg
import grpc
import structlog
import uuid_utils
from mainspring.v1 import state_pb2
from mainspring_execution.engine.catalog import Catalog as ProductCatalog
from mainspring_execution.engine.claims import Claims
from mainspring_execution.engine.deltas import Deltas
from mainspring_execution.engine.lease import Lease
from mainspring_execution.engine.runs import Runs
from mainspring_execution.engine.surroundings import Surroundings
from mainspring_execution.peers import CallPool, Dispatcher, State
from mainspring_execution.servicer import ExecutionServicer
from mainspring_gateway.config import GatewaySettings
from mainspring_gateway.engine import Engine as GatewayEngine
from mainspring_gateway.peers import Peers
from mainspring_kit.channel import Peer
from mainspring_kit.identity import ServiceTokens
from mainspring_kit.tasks import background
from mainspring_state.config import StateSettings
from mainspring_state.engine.root import Engine as StateEngine
from mainspring_state.servicer import StateServicer
from mainspring_state.store.wire import Wire as ProductWire

from tests.simulation.checks import Checker
from tests.simulation.leasing import Schema
from tests.simulation.loop import Process, SimLoop
from tests.simulation.network import Host, Network
from tests.simulation.parts import Bus, Catalog, ObservedCalls, Wire, Workers
from tests.simulation.postgres import Connection, Server

Work = Callable[[], Coroutine[Any, Any, None]]
EPOCH: Final = 1_790_000_000.0
SECRET: Final = "dev-simulation-signs-tokens-with-this-secret"
FAULTS: Final = ("run_faulted", "start_faulted", "takeover_faulted", "task_failed", "foreign_events_dropped")
STATE_SETTINGS: Final = StateSettings(
    auth_secret=SECRET,
    service_secret=SECRET,
    environment="development",
    database_url="postgresql://simulated",
    redis_url="redis://simulated",
    lease_seconds=3.0,
    broken_lease_seconds=1.0,
)
GATEWAY_SETTINGS: Final = GatewaySettings(
    auth_secret=SECRET, service_secret=SECRET, environment="development", start_seconds=4.0
)


class World:
    """Everything of one history. `hosts` by address; a kill ends a process, `boot` starts the next one there."""

    def __init__(self, seed: int, *, trace: Callable[[str], None] | None = None) -> None:
        self.rng = Random(seed)
        self.loop = SimLoop(step_seconds=self.rng.choice((0.0, 0.00002, 0.0002)))  # type: ignore[abstract]  # no I/O here
        # Its own, as making one takes an id.
        self.tokens = ServiceTokens(SECRET, "simulation")
        self._trace = trace
        self.schema = Schema(self.database_now)
        self.checker = Checker(self.schema, self.trace, self.loop.stop)
        self.server = Server(self.schema, self.loop, self.rng)
        self.server.on_statement = self.checker.standing.settled
        self.network = Network(self.loop, self.rng)
        self.network.on_send = self.checker.sent
        self.network.on_receive = self._received
        self.network.on_fault = self._broke
        self.bus = Bus(self.loop, self.rng, self.checker)
        self.loop.on_kill = self.kill
        self.gateway: GatewayEngine | None = None
        self.runs: dict[str, Runs] = {}
        self.leases: dict[str, Lease] = {}
        self.claims: dict[str, Claims] = {}
        self.states: dict[str, StateEngine] = {}
        self._incarnations = 0
        self._last_id = 0
        self._database_skew = self.rng.choice((0.0, -2.0, 5.0))

    def trace(self, line: str) -> None:
        """Notes what happens, if anybody reads it."""
        if self._trace is not None:
            self._trace(f"{self.loop.now:10.4f} {line}")

    def database_now(self) -> float:
        """The database's clock."""
        return EPOCH + self.loop.now + self._database_skew

    def clock(self) -> float:
        """`time.time` of the process that asks."""
        process = self.loop.current
        return EPOCH + self.loop.now + (process.clock_skew if process is not None else 0.0)

    def new_id(self) -> str:
        """A UUIDv7 that is the same in each replay of a history."""
        self._last_id += 1
        return f"01990000-0000-7000-8000-{self._last_id:012x}"

    def addresses(self, kind: str) -> list[str]:
        """The addresses of one kind of process."""
        return [address for address in self.network.hosts if address.startswith(kind)]

    def target(self, kind: str) -> str:
        """The same as a setting."""
        return ",".join(self.addresses(kind))

    def boot(self, address: str) -> None:
        """Starts a process at an address."""
        host = self.network.hosts[address]
        self._incarnations += 1
        kind = address.partition("-")[0]
        skew = self.rng.choice((0.0, 0.0, -1.5, 1.5))
        process = Process(f"{address.partition(':')[0]}.{self._incarnations}", clock_skew=skew)
        host.process, host.servicers = process, {}
        self.trace(f"{process} starts")
        boots: dict[str, Callable[[Host, Process], Coroutine[Any, Any, None]]] = {
            "state": self._run_state,
            "execution": self._run_execution,
            "dispatcher": self._run_dispatcher,
            "gateway": self._run_gateway,
            "browser": self._run_nothing,
        }
        process.context.run(self.loop.call_soon, self._spawn, partial(boots[kind], host, process))

    def spawn(self, process: Process, work: Work) -> None:
        """Runs something in a process."""
        process.context.run(self._spawn, work)

    def kill(self, process: Process) -> None:
        """kill -9."""
        if process.is_alive:
            self.trace(f"{process} is killed before step {process.steps}")
            process.is_alive = False
            self.network.break_calls(process)

    def _spawn(self, work: Work) -> None:
        self.loop.create_task(self._contained(work), context=contextvars.copy_context())

    async def _contained(self, work: Work) -> None:
        try:
            await work()
        except Exception as error:  # what a process dies of is a finding, whatever it is
            self._broke(f"a task of a process failed: {error!r}")

    async def _run_nothing(self, host: Host, process: Process) -> None:
        return

    async def _run_state(self, host: Host, process: Process) -> None:
        pool = cast("asyncpg.Pool[asyncpg.Record]", Connection(self.server))
        engine = StateEngine(STATE_SETTINGS, pool, wire=cast(ProductWire, Wire(self.bus)))
        host.servicers["StateService"] = StateServicer(engine)  # type: ignore[abstract]  # as in the service itself
        self.states[process.name] = engine
        await engine.run()

    async def _run_execution(self, host: Host, process: Process) -> None:
        state = State(Peer(self.target("state"), self.tokens))
        dispatcher = Dispatcher(Peer(self.target("dispatcher"), self.tokens))
        on_post = self.checker.tool_called
        observed = ObservedCalls(dispatcher.calls, lambda call: on_post(process.name, call))
        dispatcher.calls = cast(CallPool, observed)
        catalog = cast(ProductCatalog, Catalog(self.checker, self.rng, executor_id=process.name))
        lease = Lease(state, process.name)
        around = Surroundings(state, dispatcher, catalog, lease, Deltas(state))
        runs = Runs(around, runs_max=100)
        self.runs[process.name], self.leases[process.name] = runs, lease
        claims = self.claims[process.name] = Claims(around, runs)
        host.servicers["ExecutionService"] = ExecutionServicer(runs, state)
        async with background(state.appends.run(), observed.run(), lease.beat(runs.take_input), claims.run()) as tasks:
            runs.open(tasks)
            await self.loop.create_future()

    async def _run_dispatcher(self, host: Host, process: Process) -> None:
        host.servicers["DispatcherService"] = Workers(self.checker, self.loop, self.rng)

    async def _run_gateway(self, host: Host, process: Process) -> None:
        peers = Peers(
            self.tokens, registry="browser-1:1", execution=self.target("execution"), state=self.target("state")
        )
        engine = GatewayEngine(GATEWAY_SETTINGS, peers)
        async with engine.running(lambda: None):
            self.gateway = engine
            await self.loop.create_future()

    def _broke(self, what: str) -> None:
        """Something failed that nobody expects to; what happens while all is taken down does not count."""
        if not self.loop.is_reaping:
            self.checker.fail(what)

    def _received(self, process: Process, path: str, message: Any) -> None:
        if isinstance(message, state_pb2.AppendResponse):
            for result in message.results:
                self.checker.answered(process, result)


class _Log:
    """structlog's logger: lines go to the trace, those that no history may have to the checker."""

    world: World | None = None

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _note(self, event: str, **fields: object) -> None:
        world = _Log.world
        if world is None:
            return
        if event in FAULTS:
            world._broke(f"{event}: {fields}")
        world.trace(f"{world.loop.current}: {event} {fields}")

    debug = info = warning = error = _note

    def log(self, level: int, event: str, **fields: object) -> None:
        """A line of any level."""
        self._note(event, **fields)

    def bind(self, **_: object) -> _Log:
        """Nothing is bound."""
        return self

    new = unbind = try_unbind = bind


@contextmanager
def installed(world: World) -> Iterator[None]:
    """While the block runs, the libraries' clocks, ids, channels and connections are the world's."""

    async def connect(*_: object, **__: object) -> Connection:
        await asyncio.sleep(0.001)
        return Connection(world.server)

    patches = (
        (time, "time", world.clock),
        (time, "monotonic", world.loop.time),
        (time, "perf_counter", world.loop.time),
        (uuid_utils, "uuid7", world.new_id),
        (grpc.aio, "insecure_channel", world.network.channel),
        (asyncpg, "connect", connect),
    )
    originals = [getattr(module, name) for module, name, _ in patches]
    logging = structlog.get_config()
    structlog.configure(wrapper_class=cast(Any, _Log), cache_logger_on_first_use=False)
    _Log.world = world
    for module, name, value in patches:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), original in zip(patches, originals, strict=True):
            setattr(module, name, original)
        _Log.world = None
        structlog.configure(**logging)
