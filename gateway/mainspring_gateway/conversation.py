"""What a client asks on its WebSocket and what it follows there: every command, each answered by a frame."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import Principal, UserExecutionContext, new_id

from mainspring_gateway import access
from mainspring_gateway.core import commands
from mainspring_gateway.core.events import EncodedEvent
from mainspring_gateway.core.feeds import Follow
from mainspring_gateway.core.frames import FrameId, error_frame, reply
from mainspring_gateway.core.resources import state_text
from mainspring_gateway.engine import StartFuture, started
from mainspring_gateway.gateway import Gateway
from mainspring_gateway.outgoing import Outgoing


class Conversation:
    """The commands of one client and the runs it follows. Nothing here waits: what takes time runs on the engine."""

    def __init__(self, principal: Principal, outgoing: Outgoing, *, gateway: Gateway) -> None:
        self.principal = principal
        self._outgoing = outgoing
        self._gateway = gateway
        self._follows: dict[str, Follow] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_over = False

    def obey(self, command: commands.Command) -> None:
        """Begins to do what was asked; raises what can be refused at once."""
        _OBEY[type(command)](self, command)

    def leave(self) -> None:
        """The client is gone: follows nothing more, and lets go what was under way. A started run goes on."""
        self._is_over = True
        for task in tuple(self._tasks):
            task.cancel()
        for follow in tuple(self._follows.values()):
            self._gateway.engine.feeds.leave(follow)
        self._follows.clear()

    def show(self, event: EncodedEvent) -> None:
        """Shows the client an event of a run that it follows."""
        self._outgoing.send(event.frame)

    def end(self, follow: Follow, error: MainspringError | None) -> None:
        """Forgets a follow that is over, and says why if it failed."""
        self._forget(follow)
        if error is not None:
            self._outgoing.send(error_frame(follow.frame_id, error))

    def _hello(self, command: commands.Hello) -> None:
        raise MainspringError(
            Reason.REQUEST_INVALID, "The credential is known already; renew it with the op token.", field="op"
        )

    def _renew(self, command: commands.Renewal) -> None:
        principal = access.verify_user(self._gateway.verifier, command.token)
        if (principal.tenant_id, principal.user_id) != (self.principal.tenant_id, self.principal.user_id):
            detail = "it is another user's than this socket"
            raise MainspringError(Reason.TOKEN_INVALID, f"The bearer token is not valid here: {detail}.", detail=detail)
        self.principal = principal
        self._outgoing.send(reply("ok", command.frame_id))

    def _ping(self, command: commands.Ping) -> None:
        self._outgoing.send(reply("pong", command.frame_id))

    def _start(self, command: commands.Start) -> None:
        access.authorize(self.principal, access.START_RUN)
        self._gateway.refuse_when_draining()
        self._check_room()
        context = access.context_of(self.principal, session_id=command.session_id, run_id=new_id())
        follow = Follow(self, context, frame_id=command.frame_id)
        future = self._gateway.engine.start_run(command, context, follow=follow)
        self._follows[follow.run_id] = follow
        future.add_done_callback(partial(self._on_started, follow))

    def _on_started(self, follow: Follow, future: StartFuture) -> None:
        if self._is_over:
            return
        try:
            result = started(future)
        except MainspringError as error:
            self.end(follow, error)
            return
        self._outgoing.send(reply("started", follow.frame_id, run_id=result.run_id, state=state_text(result.state)))
        if result.run_id != follow.run_id:
            # The idempotency key named an earlier run.
            self._forget(follow)
            if result.run_id not in self._follows:
                self._begin(result.run_id, follow.frame_id, after_seq=0, found=lambda: None)

    def _follow(self, command: commands.FollowRun) -> None:
        access.authorize(self.principal, access.FOLLOW)
        former = self._follows.pop(command.run_id, None)
        if former is not None:
            self._gateway.engine.feeds.leave(former)
        self._check_room()
        found = partial(self._outgoing.send, reply("ok", command.frame_id))
        self._begin(command.run_id, command.frame_id, after_seq=command.after_seq, found=found)

    def _begin(self, run_id: str, frame_id: FrameId, *, after_seq: int, found: Callable[[], None]) -> None:
        context = access.context_of(self.principal, run_id=run_id)
        follow = Follow(self, context, frame_id=frame_id, after_seq=after_seq)
        self._follows[run_id] = follow
        self._spawn(self._replay(follow, context, found=found))

    async def _replay(self, follow: Follow, context: UserExecutionContext, *, found: Callable[[], None]) -> None:
        try:
            await self._gateway.engine.replay(follow, context, found=found, pace=self._outgoing.pace)
        except MainspringError as error:
            self.end(follow, error)
            return
        if follow.has_ended or self._follows.get(follow.run_id) is follow:
            self._outgoing.send(reply("caught_up", run_id=follow.run_id, seq=follow.sent_seq))

    def _unfollow(self, command: commands.UnfollowRun) -> None:
        follow = self._follows.pop(command.run_id, None)
        if follow is not None:
            self._gateway.engine.feeds.leave(follow)
        self._outgoing.send(reply("ok", command.frame_id))

    def _cancel(self, command: commands.Cancel) -> None:
        access.authorize(self.principal, access.CANCEL_RUN)
        self._spawn(self._cancel_run(command, access.context_of(self.principal, run_id=command.run_id)))

    async def _cancel_run(self, command: commands.Cancel, context: UserExecutionContext) -> None:
        try:
            await self._gateway.peers.cancel_run(context, run_id=command.run_id, reason=command.reason)
        except MainspringError as error:
            self._outgoing.send(error_frame(command.frame_id, error))
        else:
            self._outgoing.send(reply("ok", command.frame_id))

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        limit = self._gateway.settings.commands_max
        if len(self._tasks) >= limit:
            coroutine.close()
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"{limit} commands of this socket are under way: wait for an answer first.",
                queue="commands",
                limit=limit,
            )
        task = self._gateway.engine.spawn(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_room(self) -> None:
        limit = self._gateway.settings.followed_runs_max
        if len(self._follows) >= limit:
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"This socket follows {limit} runs: unfollow one, or open another socket.",
                queue="followed_runs",
                limit=limit,
            )

    def _forget(self, follow: Follow) -> None:
        if self._follows.get(follow.run_id) is follow:
            del self._follows[follow.run_id]


# Any: each method takes its own command.
_OBEY: Final[dict[type, Callable[[Conversation, Any], None]]] = {
    commands.Hello: Conversation._hello,
    commands.Renewal: Conversation._renew,
    commands.Ping: Conversation._ping,
    commands.Start: Conversation._start,
    commands.FollowRun: Conversation._follow,
    commands.UnfollowRun: Conversation._unfollow,
    commands.Cancel: Conversation._cancel,
}
