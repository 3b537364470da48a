"""Who uses the platform in a history: users who start runs and see them through, and who look where they may not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import orjson
from mainspring.v1 import state_pb2, types_pb2
from mainspring_gateway.core.commands import Start
from mainspring_gateway.core.events import EncodedEvent
from mainspring_gateway.core.follows import Follow
from mainspring_gateway.engine import Engine, started
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import UserExecutionContext

from tests.simulation.calls import as_user
from tests.simulation.wishes import Wish
from tests.simulation.world import World

RETRY_SECONDS = 0.5


class Client:
    """A user with one wish. Outlives gateways: what it has seen stays seen."""

    def __init__(self, world: World, wish: Wish, on_done: Callable[[], None]) -> None:
        """`on_done` is called when it wants nothing more."""
        self.wish = wish
        self._on_done = on_done
        self.run_id = ""
        self.seen_seq = 0
        self.has_ended = False
        self.refusal = ""
        self.engine: Engine | None = None
        self._world = world
        self._over: asyncio.Future[None] | None = None
        self._must_repeat = wish.repeats
        self._is_answered = False

    @property
    def name(self) -> str:
        """For the trace."""
        return f"client-{self.wish.number}"

    @property
    def key(self) -> tuple[str, str]:
        """Tenant and run."""
        return self.wish.tenant_id, self.run_id

    @property
    def is_done(self) -> bool:
        """Whether it wants nothing more."""
        return self.has_ended or bool(self.refusal)

    def context(self, run_id: str) -> UserExecutionContext:
        """As whom it asks."""
        wish = self.wish
        return UserExecutionContext(wish.tenant_id, wish.user_id, wish.session_id, run_id, self._world.new_id())

    def show(self, event: EncodedEvent) -> None:
        """Is shown an event."""
        self._world.trace(f"{self.name} sees #{event.seq}")
        self._world.checker.saw_event(self.name, self.key, event=event, expected_seq=self.seen_seq + 1)
        self.seen_seq = event.seq
        if event.is_terminal:
            self.has_ended = True
            self._on_done()

    def show_text(self, follow: Follow) -> None:
        """There is unfinished text; it is nobody's promise."""

    def branch(self, parent: Follow, run_id: str) -> None:
        """A sub-run was announced."""

    def end(self, follow: Follow, error: MainspringError | None) -> None:
        """A follow is over."""
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    async def go(self, engine: Engine) -> None:
        """Starts its run until it is answered, and follows until it has seen the end."""
        self._over = None
        if not self._is_answered and not self.seen_seq:
            self.run_id = ""
        while not self.is_done:
            try:
                if not self.run_id or self._must_repeat:
                    await self._start(engine)
                elif self._over is None or self._over.done():
                    await self._follow(engine)
                if self.run_id and self._over is not None and not self.is_done and not self._must_repeat:
                    await self._over
            except MainspringError as error:
                self._world.trace(f"{self.name}: {error.reason_name}")
                if error.code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
                    self.refusal = error.reason_name
                    self._on_done()
                    return
            if not self.is_done:
                await asyncio.sleep(RETRY_SECONDS)

    async def _start(self, engine: Engine) -> None:
        wish, run_id = self.wish, self._world.new_id()
        start = Start(
            None, wish.agent, "", "", orjson.dumps({"script": wish.script}), wish.session_id, idempotency_key=wish.key
        )
        was_known, self.run_id = self.run_id, self.run_id or run_id
        follow = None if was_known or self.seen_seq else Follow(self, _Owner(run_id, wish.tenant_id, wish.user_id))
        if follow is not None:
            self._over = asyncio.get_running_loop().create_future()
        future = engine.start_run(start, self.context(run_id), follow=follow)
        self._world.trace(f"{self.name} starts {run_id[-4:]}")
        try:
            await asyncio.wait([future])
            result = started(future)
        except MainspringError:
            if not was_known:
                self._over = None
                self.run_id = self.run_id if self.seen_seq else ""
            raise
        expected = was_known or (run_id if self.seen_seq else "")
        self._world.trace(f"{self.name} has {result.run_id[-4:]} {types_pb2.RunState.Name(result.state)}")
        if expected:
            self._world.checker.expect(
                result.run_id == expected, f"{self.name}: key {wish.key} started {expected} and {result.run_id}"
            )
        self.run_id, self._is_answered = result.run_id, True
        if was_known:
            self._must_repeat = False
        elif result.run_id != run_id or result.repeated_key:
            self._over = None

    async def _follow(self, engine: Engine) -> None:
        """Sees the log from where it stands, then what comes live."""
        self._over = asyncio.get_running_loop().create_future()
        owner = _Owner(self.run_id, self.wish.tenant_id, self.wish.user_id)
        follow = Follow(self, owner, after_seq=self.seen_seq)
        try:
            await engine.replay(follow, self.context(self.run_id), found=_nothing, pace=_pause)
        except MainspringError:
            self._over = None
            raise


@dataclass(frozen=True, slots=True)
class _Owner:
    run_id: str
    tenant_id: str
    user_id: str


class Onlooker:
    """A user with a Follow stream of the user's own at a state process, over its own and others' runs."""

    def __init__(self, world: World, user: UserExecutionContext, *, number: int) -> None:
        self.name = f"onlooker-{number}"
        self._world = world
        self._user = user
        self._number = 0
        self._streams = 0

    async def look(self, clients: list[Client]) -> None:
        """Follows everybody's runs again and again, until it has seen its own to their ends."""
        while not all(client.is_done for client in clients):
            try:
                await self._look_once([client for client in clients if client.run_id])
            except (grpc.RpcError, asyncio.InvalidStateError):
                self._world.trace(f"{self.name} loses its stream")
            await asyncio.sleep(RETRY_SECONDS * self._world.rng.random())

    async def _look_once(self, clients: list[Client]) -> None:
        address = self._world.rng.choice(self._world.addresses("state"))
        stub = self._world.network.state_stub(address)
        call: Any = stub.Follow(metadata=as_user(self._user), timeout=None)
        expected: dict[int, int] = {}
        # The runs as they are asked for: a client that starts again may have another one soon.
        asked: dict[int, tuple[str, str]] = {}
        subscribes = []
        for client in clients:
            number = len(asked) + 1
            after_seq = self._world.rng.randint(0, len(self._world.checker.log(client.key)))
            asked[number] = client.key
            expected[number] = after_seq
            subscribes.append(state_pb2.Subscribe(subscription_id=number, run_id=client.run_id, after_seq=after_seq))
        try:
            await call.write(state_pb2.FollowRequest(subscribe=subscribes))
            await call.done_writing()
            live: set[int] = set()
            while (response := await call.read()) is not grpc.aio.EOF:
                for delivery in response.deliveries:
                    self._take(delivery, asked, expected=expected, live=live)
        finally:
            call.cancel()

    def _take(
        self,
        delivery: state_pb2.Delivery,
        asked: dict[int, tuple[str, str]],
        *,
        expected: dict[int, int],
        live: set[int],
    ) -> None:
        checker = self._world.checker
        numbers = [number for number, (_, run_id) in asked.items() if run_id == delivery.run_id]
        if delivery.events:
            owner = (delivery.tenant_id, delivery.user_id)
            mine = (self._user.tenant_id, self._user.user_id)
            checker.expect(owner == mine, f"{self.name} sees an event of {delivery.run_id}, which is {owner}'s")
        for number in numbers:
            if delivery.subscription_id not in (0, number):
                continue
            if delivery.HasField("caught_up_seq"):
                live.add(number)
            for event in delivery.events:
                state = event.agent_thinking.provider_state
                checker.expect(not state, f"{self.name} sees the provider's state in #{event.seq} of {event.run_id}")
                if delivery.subscription_id == 0 and number not in live:
                    continue
                checker.saw(self.name, asked[number], seq=event.seq, expected_seq=expected[number] + 1)
                expected[number] = event.seq


def _nothing() -> None:
    return


async def _pause() -> None:
    return
