"""A history: what a seed makes users want and what it breaks, played to the end and judged."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mainspring.v1 import types_pb2
from mainspring_execution.core.intrinsic import is_intrinsic
from mainspring_kit.identity import UserExecutionContext

from tests.simulation.asking import Key
from tests.simulation.checks import TERMINAL
from tests.simulation.clients import Client, Onlooker
from tests.simulation.loop import LivelockError, Process
from tests.simulation.network import Host
from tests.simulation.people import People
from tests.simulation.wishes import make_wishes
from tests.simulation.world import World, installed

# After so many virtual seconds everything must have ended: takeovers take some five seconds each.
SECONDS_MAX = 60.0
# Faults come within this time; then the world is kind.
ROUGH_SECONDS = 3.0
# Of real time: a step that takes longer never ends.
CPU_SECONDS_MAX = 20.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a history."""

    seed: int
    violations: tuple[str, ...]
    seconds: float
    events: int


def play(seed: int, *, trace: Callable[[str], None] | None = None) -> Outcome:
    """Plays the history of this seed."""
    random.seed(seed)
    signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS_MAX)
    world = World(seed, trace=trace)
    with installed(world):
        try:
            history = History(world)
            history.run()
        except LivelockError as error:
            world.checker.fail(str(error))
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            world.loop.reap()
    violations = [*world.checker.violations, *world.loop.errors]
    events = sum(len(rows) for rows in world.schema.events.values())
    return Outcome(seed, tuple(violations), world.loop.now, events)


def _stop(signum: int, frame: object) -> None:
    raise LivelockError("a step does not end")


class History:
    """One seed's plan, and its course."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = world.rng
        counts = {
            "state": self._rng.choice((1, 2, 2)),
            "execution": self._rng.choice((1, 2, 2, 3)),
            "dispatcher": 1,
            "gateway": 1,
            "browser": 1,
        }
        for kind, count in counts.items():
            for number in range(1, count + 1):
                world.network.hosts[f"{kind}-{number}:1"] = Host()
        self.clients = [Client(world, wish, self._look_up) for wish in make_wishes(self._rng)]

    def run(self) -> None:
        """Plays to the end and judges."""
        world, loop = self._world, self._world.loop
        for address in world.network.hosts:
            world.boot(address)
        for _ in range(self._rng.choice((0, 1, 1, 2, 2, 3, 4))):
            loop.call_later(self._rng.random() * ROUGH_SECONDS, self._break_something)
        if self._rng.random() < 0.3:
            world.server.fault_share = 0.05
        if self._rng.random() < 0.3:
            world.bus.loss_share = 0.25
        loop.call_later(ROUGH_SECONDS, self._calm_down)
        world.checker.on_claim, world.checker.on_end = self._stall_claimer, self._look_up
        world.checker.standing.on_leave = self._kill_retrier
        browser = self._process("browser-1:1")
        people = People(world, browser)
        for client in self.clients:
            loop.call_later(client.wish.start_time, self._send, client)
            people.care_for(client)
        if self._rng.random() < 0.5:
            wish = self.clients[0].wish
            user = UserExecutionContext(wish.tenant_id, wish.user_id)
            world.spawn(browser, partial(Onlooker(world, user, number=1).look, self.clients))
        loop.run_until(SECONDS_MAX)
        self._judge()

    def _look_up(self) -> None:
        """Something has ended: when all has, and all clients have seen it, the history is over."""
        world = self._world
        if all(client.is_done for client in self.clients):
            world.loop.is_over = all(map(world.checker.has_ended, world.checker.sub_runs()))

    def _process(self, address: str) -> Process:
        process = self._world.network.hosts[address].process
        assert process is not None, "every address was booted"
        return process

    def _send(self, client: Client) -> None:
        """A client goes to the gateway, when there is one."""
        process, engine = self._process("gateway-1:1"), self._world.gateway
        if client.is_done:
            return
        if engine is None or not engine.feeds.is_attached or not process.is_alive:
            self._world.loop.call_later(0.1, self._send, client)
            return
        if client.engine is not engine:
            client.engine = engine
            self._world.spawn(process, partial(client.go, engine))

    def _break_something(self) -> None:
        world, rng = self._world, self._rng
        kind = rng.choice(("kill", "kill", "kill", "pause", "pause", "stall", "stall", "cut", "leave", "bus"))
        address = rng.choice([name for name in world.network.hosts if not name.startswith("browser")])
        process = self._process(address)
        world.trace(f"fault: {kind} {process}")
        if kind == "kill":
            process.last_step = process.steps + 1 + int(rng.random() ** 2 * 200)
            world.loop.call_later(0.2 + 1.5 * rng.random(), self._restart, address, process)
        elif kind == "pause":
            process.is_paused = True
            world.loop.call_later(rng.random() * 6.0, world.loop.resume, process)
        elif kind == "stall":
            process.stalled_until = world.loop.now + 1.0 + rng.random() * 5.0
        elif kind == "cut":
            other = self._process(rng.choice(list(world.network.hosts)))
            world.network.break_calls(process, other)
        elif kind == "leave" and address.startswith(("execution", "state")):
            self._leave(address, process)
        elif kind == "bus":
            self._break_bus()

    def _stall_claimer(self, executor_id: str) -> None:
        """A claim is slow on its way: whoever had the run before may write meanwhile."""
        for host in self._world.network.hosts.values():
            if host.process is not None and host.process.name == executor_id and self._rng.random() < 0.5:
                host.process.stalled_until = self._world.loop.now + self._rng.random() * 3.0

    def _kill_retrier(self, executor_id: str) -> None:
        """Who has leave to make an unsafe call again dies of it, now and then, as the one before did."""
        for address, host in self._world.network.hosts.items():
            process = host.process
            if process is not None and process.name == executor_id and self._rng.random() < 0.5:
                self._world.loop.call_later(self._rng.random() * 0.5, self._restart, address, process)

    def _restart(self, address: str, process: Process) -> None:
        """Kills what the step did not come to, and starts its successor."""
        if self._process(address) is not process:
            return
        self._world.kill(process)
        if address.startswith("gateway"):
            self._world.gateway = None
        self._world.boot(address)
        if address.startswith("gateway"):
            for client in self.clients:
                if self._world.loop.now > client.wish.start_time:
                    self._world.loop.call_later(0.05, self._send, client)

    def _leave(self, address: str, process: Process) -> None:
        """SIGTERM: drains, and is gone soon."""
        if address.startswith("state") and process.name in self._world.states:
            process.context.run(self._world.loop.call_soon, self._world.states[process.name].drain)
        elif process.name in self._world.runs:
            self._world.spawn(process, partial(self._drain, process))
        self._world.loop.call_later(1.0, self._restart, address, process)

    async def _drain(self, process: Process) -> None:
        runs = self._world.runs[process.name]
        runs.is_draining = True
        self._world.claims[process.name].stop()
        await runs.drain(self._rng.random())
        await self._world.leases[process.name].leave()

    def _break_bus(self) -> None:
        bus = self._world.bus
        bus.is_down = True
        for queue in bus.listeners.values():
            queue.put_nowait(b"")
        self._world.loop.call_later(self._rng.random() * 4.0, self._mend_bus)

    def _mend_bus(self) -> None:
        self._world.bus.is_down = False

    def _calm_down(self) -> None:
        self._world.network.is_rough = False
        self._world.server.fault_share = 0.0
        self._world.bus.loss_share = 0.0

    def _judge(self) -> None:
        """What must hold at the end."""
        world, checker = self._world, self._world.checker
        if checker.violations:
            return
        by_key: dict[tuple[str, str, str], set[str]] = {}
        for client in self.clients:
            wish = client.wish
            if client.refusal:
                checker.fail(f"{client.name} was refused: {client.refusal}")
                continue
            log = checker.log(client.key)
            kinds = [event.WhichOneof("payload") for event in log]
            checker.expect(client.has_ended, f"{client.name}: run {client.run_id} has not ended: {kinds}")
            checker.expect(client.seen_seq == len(log), f"{client.name} saw {client.seen_seq} of {len(log)} events")
            checker.expect(sum(kind in TERMINAL for kind in kinds) <= 1, f"{client.run_id} has two ends")
            by_key.setdefault((wish.tenant_id, wish.user_id, wish.key), set()).add(client.run_id)
            self._judge_calls(client.key)
        for key, run_ids in by_key.items():
            checker.expect(len(run_ids) == 1, f"the key {key} started {run_ids}")
        sub_runs = checker.sub_runs()
        for sub_run in sub_runs:
            checker.expect(checker.has_ended(sub_run), f"sub-run {sub_run[1]} has not ended")
            self._judge_calls(sub_run)
        made = {run_id for _, run_id in world.schema.runs.keys() - set(sub_runs)}
        asked = {client.run_id for client in self.clients}
        checker.expect(made <= asked, f"runs that nobody was told of: {made - asked}")

    def _judge_calls(self, key: Key) -> None:
        """No call is left open by a run's end, what succeeded had its effect, and what people asked for was done."""
        checker = self._world.checker
        log = checker.log(key)
        checker.standing.judge(key, log)
        outcomes = {}
        begun = set()
        # Of these a person said what they have done.
        told = {event.approval_requested.call_id for event in log if event.HasField("approval_requested")}
        for event in log:
            if event.HasField("tool_executing"):
                begun.add(event.tool_executing.call_id)
            elif event.HasField("tool_completed"):
                outcomes[event.tool_completed.call_id] = event.tool_completed
        checker.expect(begun <= outcomes.keys(), f"{key[1]} ended with open calls: {begun - outcomes.keys()}")
        for call_id, outcome in outcomes.items():
            if outcome.status == types_pb2.TOOL_STATUS_OK and not is_intrinsic(outcome.tool) and call_id not in told:
                checker.expect(checker.arrivals[call_id], f"{call_id} succeeded without its effect")
