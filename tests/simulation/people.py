"""What people do to runs from outside: cancel, pause, resume, signal, answer; twice, late, and where they may not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

import grpc
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import from_rpc_error
from mainspring_kit.identity import UserExecutionContext

from tests.simulation.asking import Key
from tests.simulation.calls import as_user
from tests.simulation.clients import Client
from tests.simulation.loop import Process
from tests.simulation.world import World

RETRY_SECONDS: Final = 0.5
# What is answered so is answered for good.
FINAL: Final = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.ALREADY_EXISTS)
ACTIONS: Final = (b'{"action":"retry"}', b'{"action":"retry"}', b'{"action":"fail"}', b'{"action":"result","result":1}')


class People:
    """Everybody who asks something of runs. They reach state by themselves, from the process `browser`."""

    def __init__(self, world: World, browser: Process) -> None:
        self._world = world
        self._browser = browser
        world.checker.standing.on_question = self._be_asked

    def care_for(self, client: Client) -> None:
        """Does to the client's run what was planned, each at its time."""
        wish = client.wish
        if wish.cancel_after is not None:
            cancel = state_pb2.PutInputRequest(request_id=f"cancel-{wish.number}", cancel=state_pb2.CancelInput())
            self._later(wish.start_time + wish.cancel_after, partial(self._ask_client, client, cancel))
        for number, (seconds, duration) in enumerate(wish.pauses):
            name = f"{wish.number}-{number}"
            self._later(wish.start_time + seconds, partial(self._pause, client, name, duration=duration))
        for number, (seconds, signal_name) in enumerate(wish.signals):
            signal = state_pb2.SignalInput(name=signal_name, data=b"%d" % number)
            request = state_pb2.PutInputRequest(request_id=f"signal-{wish.number}-{number}", signal=signal)
            for _ in range(self._times()):
                self._later(wish.start_time + seconds, partial(self._ask_client, client, request))

    def _times(self) -> int:
        """How often somebody asks for the same, under one request id."""
        return 2 if self._world.rng.random() < 0.2 else 1

    def _later(self, seconds: float, work: Callable[[], object]) -> None:
        self._world.loop.call_later(seconds, self._world.spawn, self._browser, work)

    async def _pause(self, client: Client, name: str, *, duration: float) -> None:
        """Whoever stops a run lets it go on, whatever others do: in the end none stands still."""
        pause = state_pb2.PutInputRequest(request_id=f"pause-{name}", pause=state_pb2.PauseInput())
        if not await self._ask_client(client, pause):
            return
        await asyncio.sleep(duration)
        resume = state_pb2.PutInputRequest(request_id=f"resume-{name}", resume=state_pb2.ResumeInput())
        await self._ask_client(client, resume)

    def _be_asked(self, key: Key, question: events_pb2.ApprovalRequested) -> None:
        """One or two answer; where the time is bounded, perhaps nobody; where they may not, others try."""
        rng, world = self._world.rng, self._world
        is_bounded = question.HasField("expires_time")
        is_unknown = question.kind == types_pb2.APPROVAL_KIND_UNKNOWN_OUTCOME
        owner = world.schema.runs[key]["user_id"]
        people = [owner] * rng.choice((0, 1, 1, 2) if is_bounded else (1, 1, 1, 2))
        if rng.random() < 0.1:
            people.append("eve")
        for number, user_id in enumerate(people):
            is_late = rng.random() < 0.1
            is_allowed = is_unknown or rng.random() < 0.7
            data = rng.choice(ACTIONS) if is_unknown else b'{"number":%d}' % number
            answer = state_pb2.ApprovalInput(
                approval_id=question.approval_id,
                decision=types_pb2.APPROVAL_DECISION_ALLOW if is_allowed else types_pb2.APPROVAL_DECISION_DENY,
                data=data,
            )
            request = state_pb2.PutInputRequest(request_id=f"answer-{question.approval_id}-{number}", approval=answer)
            user = UserExecutionContext(key[0], user_id, run_id=key[1], roles=("runner",))
            for _ in range(self._times()):
                self._later(rng.random() * 2.0 + 3.0 * is_late, partial(self._answer, user, request))

    async def _answer(self, user: UserExecutionContext, request: state_pb2.PutInputRequest) -> None:
        is_over = partial(self._world.checker.has_ended, (user.tenant_id, user.run_id))
        while not is_over():
            if await self._try_to_ask(user, request) is not None:
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def _ask_client(self, client: Client, request: state_pb2.PutInputRequest) -> bool:
        """Asks until that is stored or refused; whether it was stored."""
        while not client.is_done:
            if client.run_id:
                asked = await self._try_to_ask(client.context(client.run_id), request)
                if asked is not None:
                    return asked
            await asyncio.sleep(RETRY_SECONDS)
        return False

    async def _try_to_ask(self, user: UserExecutionContext, request: state_pb2.PutInputRequest) -> bool | None:
        """Whether it is stored; None: it is not known, or there is no such run yet."""
        world = self._world
        kind, asked = request.WhichOneof("input"), state_pb2.PutInputRequest()
        asked.CopyFrom(request)
        asked.run_id = user.run_id
        stub = world.network.state_stub(world.target("state"))
        try:
            await stub.PutInput(asked, metadata=as_user(user), timeout=2.0)
        except grpc.aio.AioRpcError as error:
            world.trace(f"{user.user_id} may not {kind}: {from_rpc_error(error).reason_name}")
            is_no_approval = kind == "approval" and error.code() is grpc.StatusCode.NOT_FOUND
            return False if error.code() in FINAL or is_no_approval else None
        world.trace(f"{user.user_id} has asked for {kind} of {user.run_id[-4:]}")
        world.checker.standing.was_taken(user, asked)
        return True
