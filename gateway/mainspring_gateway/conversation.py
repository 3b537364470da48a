"""What a client asks on its WebSocket and what it follows there: every command, each answered by a frame."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final

from google.protobuf.descriptor import MethodDescriptor
from mainspring.v1 import execution_pb2
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import Principal, UserExecutionContext, new_id

from mainspring_gateway import access
from mainspring_gateway.core import commands
from mainspring_gateway.core.events import EncodedEvent
from mainspring_gateway.core.follows import Follow
from mainspring_gateway.core.frames import FrameId, error_frame, reply
from mainspring_gateway.core.resources import state_text
from mainspring_gateway.engine import StartFuture, started
from mainspring_gateway.gateway import Gateway
from mainspring_gateway.outgoing import Outgoing

_CONTROLS: Final = {"cancel": access.CANCEL_RUN, "pause": access.PAUSE_RUN, "resume": access.RESUME_RUN}
# A sub-run is announced before it is made: how often it is looked for.
_BRANCH_SECONDS_MIN: Final = 0.05
_BRANCH_SECONDS_MAX: Final = 1.0


class Conversation:
    """The commands of one client and the runs it follows. Nothing here waits: what takes time runs on the engine."""

    def __init__(self, principal: Principal, outgoing: Outgoing, *, gateway: Gateway) -> None:
        self.principal = principal
        self._outgoing = outgoing
        self._gateway = gateway
        self._follows: dict[str, Follow] = {}
        # Sub-runs that are followed because the root of their tree is, each with that run.
        self._roots: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._branches: set[asyncio.Task[None]] = set()
        self._is_over = False

    def obey(self, command: commands.Command) -> None:
        """Begins to do what was asked; raises what can be refused at once."""
        _OBEY[type(command)](self, command)

    def leave(self) -> None:
        """The client is gone: follows nothing more, and lets go what was under way. A started run goes on."""
        self._is_over = True
        for task in (*self._tasks, *self._branches):
            task.cancel()
        for follow in tuple(self._follows.values()):
            self._gateway.engine.feeds.leave(follow)
        self._follows.clear()
        self._roots.clear()

    def show(self, event: EncodedEvent) -> None:
        """Shows the client an event of a run that it follows."""
        self._outgoing.send(event.frame)

    def show_text(self, follow: Follow) -> None:
        """Shows the client unfinished text as it can take it."""
        self._outgoing.offer(follow)

    def branch(self, parent: Follow, run_id: str) -> None:
        """Follows a sub-run from its first event, as long as the run is followed with which the tree began."""
        if self._is_over or run_id in self._follows:
            return
        root = self._roots.get(parent.run_id, parent.run_id)
        try:
            self._check_room(run_id)
        except MainspringError as error:
            self._outgoing.send(error_frame(None, error))
            return
        self._roots[run_id] = root
        context = access.context_of(self.principal, run_id=run_id)
        follow = self._follows[run_id] = Follow(self, context)
        task = self._gateway.engine.spawn(self._follow_branch(follow, context, root=root))
        self._branches.add(task)
        task.add_done_callback(self._branches.discard)

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
        context = access.context_of(self.principal, session_id=command.session_id, run_id=new_id())
        self._check_room(context.run_id)
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
                self._begin(result.run_id, follow.frame_id)

    def _follow(self, command: commands.FollowRun) -> None:
        access.authorize(self.principal, access.FOLLOW)
        self._leave_run(command.run_id)
        self._check_room(command.run_id)
        found = partial(self._outgoing.send, reply("ok", command.frame_id))
        self._begin(command.run_id, command.frame_id, after_seq=command.after_seq, found=found)

    def _begin(
        self, run_id: str, frame_id: FrameId, *, after_seq: int = 0, found: Callable[[], None] = lambda: None
    ) -> None:
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
        self._confirm_replay(follow)

    def _confirm_replay(self, follow: Follow) -> None:
        if follow.has_ended or self._follows.get(follow.run_id) is follow:
            self._outgoing.send(reply("caught_up", run_id=follow.run_id, seq=follow.sent_seq))

    async def _follow_branch(self, follow: Follow, context: UserExecutionContext, *, root: str) -> None:
        """Looks for the announced run until it is there, or its tree is followed no more."""
        delay = _BRANCH_SECONDS_MIN
        while True:
            try:
                await self._gateway.engine.replay(follow, context, found=lambda: None, pace=self._outgoing.pace)
            except MainspringError as error:
                if error.rule is not Reason.RUN_NOT_FOUND:
                    self.end(follow, error)
                    return
            else:
                self._confirm_replay(follow)
                return
            if root not in self._follows or self._follows.get(follow.run_id) is not follow:
                self._forget(follow)
                return
            follow = self._follows[follow.run_id] = Follow(self, context)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, _BRANCH_SECONDS_MAX)

    def _unfollow(self, command: commands.UnfollowRun) -> None:
        self._leave_run(command.run_id)
        for run_id in [branch for branch, root in self._roots.items() if root == command.run_id]:
            self._leave_run(run_id)
        self._outgoing.send(reply("ok", command.frame_id))

    def _leave_run(self, run_id: str) -> None:
        self._roots.pop(run_id, None)
        follow = self._follows.pop(run_id, None)
        if follow is not None:
            self._gateway.engine.feeds.leave(follow)

    def _control(self, command: commands.Control) -> None:
        context = self._may(_CONTROLS[command.verb], run_id=command.run_id)
        control = self._gateway.peers.control_run
        ask = partial(control, context, command.verb, run_id=command.run_id, reason=command.reason)
        self._spawn(self._confirm(command.frame_id, ask))

    def _signal(self, command: commands.Signal) -> None:
        context = self._may(access.SIGNAL_RUN, run_id=command.run_id)
        request = execution_pb2.SignalRunRequest(run_id=command.run_id, name=command.name, data=command.data)
        self._spawn(self._confirm(command.frame_id, partial(self._gateway.peers.signal_run, context, request)))

    def _approve(self, command: commands.Approve) -> None:
        context = self._may(access.RESOLVE_APPROVAL)
        request = execution_pb2.ResolveApprovalRequest(
            approval_id=command.approval_id, decision=command.decision, data=command.data
        )
        self._spawn(self._confirm(command.frame_id, partial(self._gateway.peers.resolve_approval, context, request)))

    def _retry(self, command: commands.Retry) -> None:
        context = self._may(access.RETRY_RUN, run_id=command.run_id)
        self._gateway.refuse_when_draining()
        self._check_room(command.run_id)
        self._spawn(self._retry_run(command, context))

    async def _retry_run(self, command: commands.Retry, context: UserExecutionContext) -> None:
        try:
            result = await self._gateway.peers.retry_run(context, run_id=command.run_id)
        except MainspringError as error:
            self._outgoing.send(error_frame(command.frame_id, error))
            return
        self._outgoing.send(reply("started", command.frame_id, run_id=result.run_id, state=state_text(result.state)))
        if result.run_id not in self._follows:
            context = access.context_of(self.principal, run_id=result.run_id)
            follow = self._follows[result.run_id] = Follow(self, context, frame_id=command.frame_id)
            await self._replay(follow, context, found=lambda: None)

    def _may(self, method: MethodDescriptor, *, run_id: str = "") -> UserExecutionContext:
        """The context of what the client asks, if its role allows that."""
        access.authorize(self.principal, method)
        return access.context_of(self.principal, run_id=run_id)

    async def _confirm(self, frame_id: FrameId, ask: Callable[[], Awaitable[object]]) -> None:
        try:
            await ask()
        except MainspringError as error:
            self._outgoing.send(error_frame(frame_id, error))
        else:
            self._outgoing.send(reply("ok", frame_id))

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

    def _check_room(self, run_id: str) -> None:
        limit = self._gateway.settings.followed_runs_max
        if len(self._follows) >= limit:
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"This socket follows {limit} runs, so not run {run_id}: unfollow one, or open another socket.",
                queue="followed_runs",
                limit=limit,
            )

    def _forget(self, follow: Follow) -> None:
        if self._follows.get(follow.run_id) is follow:
            del self._follows[follow.run_id]
            self._roots.pop(follow.run_id, None)


# Any: each method takes its own command.
_OBEY: Final[dict[type, Callable[[Conversation, Any], None]]] = {
    commands.Hello: Conversation._hello,
    commands.Renewal: Conversation._renew,
    commands.Ping: Conversation._ping,
    commands.Start: Conversation._start,
    commands.FollowRun: Conversation._follow,
    commands.UnfollowRun: Conversation._unfollow,
    commands.Control: Conversation._control,
    commands.Signal: Conversation._signal,
    commands.Approve: Conversation._approve,
    commands.Retry: Conversation._retry,
}
