"""Builds the parts of the engine, runs them in one task group, and serves the streams that they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit import postgres
from mainspring_kit.identity import UserExecutionContext, caller_variable, new_id
from mainspring_kit.streams import Replies, call_tasks, serve_batches

from mainspring_state.config import StateSettings
from mainspring_state.core.append import ENDED_STATES
from mainspring_state.core.backlog import Backlog
from mainspring_state.core.drafts import Drafts
from mainspring_state.core.holds import explain
from mainspring_state.core.refusals import run_not_found
from mainspring_state.engine.committer import Committer
from mainspring_state.engine.executors import Executors, LeaseTimes
from mainspring_state.engine.follower import Follower, FollowLimits, Sources
from mainspring_state.engine.hub import EndWaiter, Hub
from mainspring_state.engine.presence import Presence
from mainspring_state.engine.talk import Talk
from mainspring_state.engine.webhooks import Teller
from mainspring_state.store.leases import Leases
from mainspring_state.store.oversight import Oversight
from mainspring_state.store.reads import Reads
from mainspring_state.store.webhooks import Webhooks
from mainspring_state.store.wire import Wire

OUTSTANDING_MAX = 16_384


class Engine:
    """One state process: its committer, its watchers, its executors."""

    def __init__(self, settings: StateSettings, pool: postgres.Pool, *, wire: Wire) -> None:
        self.state_id = new_id()
        self.reads = Reads(pool)
        self.oversight = Oversight(pool)
        drafts = Drafts(bytes_max=settings.draft_bytes_max)
        self._hub = Hub(runs_max=settings.tail_runs_max, bytes_max=settings.tail_bytes_max, drafts=drafts)
        leases = Leases(pool, self.state_id, lease_seconds=settings.lease_seconds)
        self._presence = Presence(leases)
        self._talk = Talk(wire, self._hub, presence=self._presence, leases=leases, state_id=self.state_id)
        self._committer = Committer(
            settings.database_url,
            self._hub,
            backlog=Backlog(items_max=settings.backlog_appends_max, bytes_max=settings.backlog_bytes_max),
            now=self._presence.now,
            is_heard=self._talk.is_heard,
            publish=self._talk.publish_deliveries,
            on_ready=self._kick,
            on_input=lambda holder, run_input: self.executors.tell(holder, run_input),
        )
        times = LeaseTimes(settings.lease_seconds, settings.broken_lease_seconds, settings.claim_seconds)
        self.executors = Executors(leases, self._presence, talk=self._talk, times=times, submit=self._committer.submit)
        self._talk.listener = self.executors
        self._teller = Teller(
            Webhooks(pool),
            secret=settings.service_secret.get_secret_value(),
            allows_private=settings.webhook_private,
        )
        slots = asyncio.Semaphore(max(1, settings.database_connections_max - 2))
        self._sources = Sources(self._hub, self.reads, self._talk.heal, slots)
        self._limits = FollowLimits(
            settings.follow_deliveries_max, settings.follow_bytes_max, settings.subscriptions_max
        )
        self._followers: set[Follower] = set()
        self._replies: set[Replies[state_pb2.AppendResult]] = set()
        self._waiters: set[EndWaiter] = set()
        self._publishers: set[asyncio.Event] = set()
        self._is_draining = False

    @property
    def is_ready(self) -> bool:
        """Whether appends and reads can be served now."""
        return self._committer.is_connected and self._presence.connected is not None and not self._is_draining

    async def run(self) -> None:
        """Runs all parts as long as it is awaited; when one fails, all end."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._presence.run())
                tasks.create_task(self._committer.run())
                tasks.create_task(self._talk.run())
                tasks.create_task(self.executors.run())
                tasks.create_task(self._teller.run())
        finally:
            await self._presence.leave()

    def drain(self) -> None:
        """Ends all streams and waits, each after what it owes, so that callers go on elsewhere."""
        self._is_draining = True
        self.executors.drain()
        for replies in list(self._replies):
            replies.end()
        for follower in list(self._followers):
            follower.drain()
        for waiter in list(self._waiters):
            waiter.wake()
        for is_over in self._publishers:
            is_over.set()

    async def append(self, requests: AsyncIterator[state_pb2.AppendRequest]) -> AsyncIterator[state_pb2.AppendResponse]:
        """Serves one Append stream."""
        replies: Replies[state_pb2.AppendResult] = Replies("Append", OUTSTANDING_MAX)

        def receive(request: state_pb2.AppendRequest) -> None:
            replies.expect(len(request.appends))
            for append in request.appends:
                self._committer.submit(append, replies.put)

        self._replies.add(replies)
        try:
            yield state_pb2.AppendResponse(state_id=self.state_id)
            async for response in serve_batches(requests, replies, receive=receive, frame=_append_frame):
                yield response
        finally:
            self._replies.discard(replies)

    async def follow(self, requests: AsyncIterator[state_pb2.FollowRequest]) -> AsyncIterator[state_pb2.FollowResponse]:
        """Serves one Follow stream."""
        follower = Follower(self._sources, self._limits, caller=caller_variable.get(), state_id=self.state_id)
        self._followers.add(follower)
        try:
            async for response in follower.follow(requests):
                yield response
        finally:
            self._followers.discard(follower)

    async def publish_deltas(
        self, requests: AsyncIterator[state_pb2.PublishDeltasRequest]
    ) -> AsyncIterator[state_pb2.PublishDeltasResponse]:
        """Serves one PublishDeltas stream."""
        is_over = asyncio.Event()

        async def read() -> None:
            async for request in requests:
                for published in request.deltas:
                    self._hub.take_text(published)
                self._talk.publish_text(request)
            is_over.set()

        self._publishers.add(is_over)
        try:
            call_tasks.get().create_task(read())
            yield state_pb2.PublishDeltasResponse(state_id=self.state_id)
            await is_over.wait()
        finally:
            self._publishers.discard(is_over)

    async def wait_run(self, user: UserExecutionContext, run_id: str, *, timeout_seconds: float) -> types_pb2.Run:
        """The run when it has ended, or as it is when the time is over. RUN_NOT_FOUND."""
        waiter = EndWaiter()
        key = (user.tenant_id, run_id.lower())
        feed = self._hub.watch(key, waiter)
        self._waiters.add(waiter)
        try:
            run = await self.get_run(user, run_id)
            if run.state in ENDED_STATES or self._is_draining:
                return run
            feed.user_id = run.user_id
            feed.settle(run.last_seq)
            if feed.last_seq < run.last_seq:
                await self._talk.heal(key, feed)
            await asyncio.wait([waiter.ended], timeout=timeout_seconds)
        finally:
            self._waiters.discard(waiter)
            self._hub.unwatch(key, waiter)
        return await self.get_run(user, run_id)

    async def get_run(self, user: UserExecutionContext, run_id: str) -> types_pb2.Run:
        """A run of the user. RUN_NOT_FOUND."""
        run = await self.reads.get_run(user, run_id)
        if run is None:
            raise run_not_found(run_id)
        return run

    async def explain(self, user: UserExecutionContext, run: types_pb2.Run) -> tuple[list[types_pb2.Hold], str]:
        """Why a run of the user does not go on, and the executor that holds it, if one does."""
        known = await self.oversight.circumstances(user, run)
        return explain(run, known, now=self._presence.now()), known.executor_id

    def _kick(self) -> None:
        self.executors.kick()
        self._talk.publish_ready()


def _append_frame(results: list[state_pb2.AppendResult]) -> state_pb2.AppendResponse:
    return state_pb2.AppendResponse(results=results)
