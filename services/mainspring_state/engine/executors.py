"""Who drives runs: beats that keep leases, claims of what nobody drives, and inputs on their way to the holders."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from mainspring.v1 import events_pb2, state_pb2
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import UserExecutionContext, new_id
from mainspring_kit.streams import Outbox, call_tasks

from mainspring_state.core.append import ENDED_STATES
from mainspring_state.core.inputs import refused_answer, refused_input
from mainspring_state.core.poison import open_calls, poisoned
from mainspring_state.engine.committer import Answer
from mainspring_state.engine.presence import Presence
from mainspring_state.engine.talk import Talk
from mainspring_state.store.leases import CLAIM_PAGE_MAX, UNCONSUMED_MAX, Claim, Leases, StoredInput

INPUT_SECONDS: Final = 1.0
TIDY_SECONDS: Final = 30.0
# Runs that wake one soon after the other are claimed together.
CLAIM_SECONDS_MIN: Final = 0.05
LOG_PAGE_MAX: Final = 1_000
LOG_PAGE_BYTES_MAX: Final = 4 << 20

_EXECUTOR_ID: Final = re.compile(r"[^\x00-\x1f\x7f]{1,128}")


@dataclass(slots=True, eq=False)
class _Heartbeat:
    """One heartbeat stream."""

    stream_id: str
    outbox: Outbox[state_pb2.HeartbeatResponse]
    executor_id: str = ""
    has_left: bool = False


@dataclass(slots=True, eq=False)
class _Claimer:
    """One claim stream."""

    executor_id: str
    credit: int
    outbox: Outbox[state_pb2.ClaimedRun]


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """In seconds: the lease, the lease once the heartbeat stream broke, the longest wait between looks for claims."""

    lease: float
    broken_lease: float
    claim: float


class Executors:
    """The executors that are connected to this process."""

    def __init__(
        self,
        leases: Leases,
        presence: Presence,
        *,
        talk: Talk,
        times: LeaseTimes,
        submit: Callable[[state_pb2.Append, Answer], None],
    ) -> None:
        self._leases = leases
        self._presence = presence
        self._talk = talk
        self._times = times
        self._submit = submit
        self._heartbeats: dict[str, _Heartbeat] = {}
        self._claimers: list[_Claimer] = []
        self._chances = asyncio.Event()
        # Executors whose last claims may not have reached them.
        self._doubtful: set[str] = set()
        self._farewells: asyncio.Queue[_Heartbeat] = asyncio.Queue()
        # Runs to be ended, by tenant and run, each with its latest claim: only that one's epoch is in force.
        self._poisoned: dict[tuple[str, str], Claim] = {}
        self._has_poisoned = asyncio.Event()
        self._is_draining = False

    async def run(self) -> None:
        """Goes on as long as it is awaited."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._claim_for_all())
            tasks.create_task(self._repeat_inputs())
            tasks.create_task(self._bid_farewell())
            tasks.create_task(self._end_poisoned())

    def kick(self) -> None:
        """Some run became claimable: look at once."""
        self._chances.set()

    def hear_input(self, executor_id: str, run_input: state_pb2.RunInput) -> None:
        """Tells a holder that beats to this process; others hear it elsewhere or not at all."""
        heartbeat = self._heartbeats.get(executor_id)
        if heartbeat is not None:
            _tell(heartbeat, state_pb2.HeartbeatResponse(inputs=[run_input]))

    def drain(self) -> None:
        """Ends all streams: executors beat and claim on elsewhere."""
        self._is_draining = True
        for heartbeat in self._heartbeats.values():
            heartbeat.outbox.close()
        for claimer in self._claimers:
            claimer.outbox.close()

    async def put_input(
        self, user: UserExecutionContext, run_input: state_pb2.RunInput, *, is_holder: bool
    ) -> state_pb2.RunInput:
        """Stores what is asked of a run and tells its holder, or lets somebody claim the run.

        `is_holder`: an expiry of an approval, which only the run's holder says.
        """
        stored = await self._leases.put_input(user, run_input, is_holder=is_holder)
        if stored is None or stored.reason:
            raise _refusal(run_input, stored)
        if stored.holder:
            self.tell(stored.holder, stored.input)
        elif stored.state not in ENDED_STATES:
            self.kick()
            self._talk.publish_ready()
        return stored.input

    def tell(self, holder: str, run_input: state_pb2.RunInput) -> None:
        """Tells a run's holder, wherever it beats, of an input."""
        if holder in self._heartbeats:
            self.hear_input(holder, run_input)
        else:
            self._talk.publish_input(holder, run_input)

    async def heartbeat(
        self, requests: AsyncIterator[state_pb2.HeartbeatRequest]
    ) -> AsyncIterator[state_pb2.HeartbeatResponse]:
        """Serves one heartbeat stream."""
        heartbeat = _Heartbeat(new_id(), Outbox("heartbeat", items_max=10_000))
        call_tasks.get().create_task(self._read_beats(requests, heartbeat))
        try:
            while responses := await heartbeat.outbox.take():
                for response in responses:
                    yield response
        finally:
            if self._heartbeats.get(heartbeat.executor_id) is heartbeat:
                del self._heartbeats[heartbeat.executor_id]
            if heartbeat.executor_id and not heartbeat.has_left and not self._is_draining:
                self._farewells.put_nowait(heartbeat)

    async def claim(self, request: state_pb2.ClaimRunsRequest) -> AsyncIterator[state_pb2.ClaimRunsResponse]:
        """Serves one claim stream."""
        _check_executor_id(request.executor_id)
        claimer = _Claimer(request.executor_id, request.credit, Outbox("claims", items_max=100_000))
        self._claimers.append(claimer)
        self.kick()
        try:
            while runs := await claimer.outbox.take():
                for start in range(0, len(runs), CLAIM_PAGE_MAX):
                    yield state_pb2.ClaimRunsResponse(runs=runs[start : start + CLAIM_PAGE_MAX])
        finally:
            self._claimers.remove(claimer)
            self._doubtful.add(claimer.executor_id)
            self.kick()

    async def _read_beats(self, requests: AsyncIterator[state_pb2.HeartbeatRequest], heartbeat: _Heartbeat) -> None:
        async for request in requests:
            _check_executor_id(request.executor_id)
            heartbeat.executor_id = request.executor_id
            self._heartbeats[request.executor_id] = heartbeat
            try:
                if request.leaving:
                    await self._leases.shorten_lease(request.executor_id, "", seconds=0)
                    heartbeat.has_left = True
                    self.kick()
                    self._talk.publish_ready()
                else:
                    await self._leases.beat(request.executor_id, heartbeat.stream_id)
            except MainspringError as error:
                # Not stored, so not answered: the executor knows by itself how old its last stored beat is.
                telemetry.logger().debug("beat_lost", executor_id=request.executor_id, detail=str(error)[:200])
                continue
            lease = Duration()
            lease.FromMilliseconds(int(self._times.lease * 1_000))
            _tell(heartbeat, state_pb2.HeartbeatResponse(beat=request.beat, lease=lease))
        heartbeat.outbox.close()

    async def _bid_farewell(self) -> None:
        """After a heartbeat stream broke: less patience with its executor."""
        while True:
            gone = await self._farewells.get()
            try:
                await self._leases.shorten_lease(gone.executor_id, gone.stream_id, seconds=self._times.broken_lease)
            except MainspringError as error:
                telemetry.logger().debug("farewell_lost", executor_id=gone.executor_id, detail=str(error)[:200])
            asyncio.get_running_loop().call_later(self._times.broken_lease, self.kick)

    async def _repeat_inputs(self) -> None:
        """Tells holders again what they have not consumed: a word may be lost, a holder may be new."""
        while True:
            await asyncio.sleep(INPUT_SECONDS)
            if not self._heartbeats:
                continue
            try:
                found = await self._leases.inputs_for(list(self._heartbeats))
            except MainspringError as error:
                telemetry.logger().debug("inputs_delayed", detail=str(error)[:200])
                continue
            for executor_id, run_input in found:
                self.hear_input(executor_id, run_input)

    async def _claim_for_all(self) -> None:
        tidy_due = 0.0
        while True:
            self._chances.clear()
            pause = self._times.claim
            try:
                await self._disown_doubtful()
                while await self._claim_round():
                    pass
                if self._claimers and (due := await self._leases.next_due()) is not None:
                    pause = min(pause, max(due, CLAIM_SECONDS_MIN))
                if time.monotonic() >= tidy_due:
                    await self._leases.tidy_ready()
                    tidy_due = time.monotonic() + TIDY_SECONDS
            except MainspringError as error:
                telemetry.logger().debug("claims_delayed", detail=str(error)[:200])
            try:
                async with asyncio.timeout(pause):
                    await self._chances.wait()
            except TimeoutError:
                pass

    async def _disown_doubtful(self) -> None:
        """Until the database has heard it: nobody else would ever look at these claims again."""
        for executor_id in list(self._doubtful):
            await self._leases.disown(executor_id)
            self._doubtful.discard(executor_id)

    async def _claim_round(self) -> bool:
        """Claims once for each claimer; says whether anybody got a full page, so that there may be more."""
        connected = self._presence.connected
        if connected is None:
            return False
        is_full = False
        for claimer in list(self._claimers):
            try:
                claims = await self._leases.claim(claimer.executor_id, credit=claimer.credit, connected=connected)
                for claim in claims:
                    if claim.is_poisoned:
                        self._poisoned[claim.run.tenant_id, claim.run.run_id] = claim
                        self._has_poisoned.set()
                await self._hand_over(claimer, [claim for claim in claims if not claim.is_poisoned])
            except MainspringError:
                # Made or not, nobody knows.
                self._doubtful.add(claimer.executor_id)
                raise
            is_full = is_full or len(claims) >= CLAIM_PAGE_MAX
        # The first come would be served first: everybody gets a turn.
        self._claimers = self._claimers[1:] + self._claimers[:1]
        return is_full

    async def _hand_over(self, claimer: _Claimer, claims: list[Claim]) -> None:
        if not claims:
            return
        inputs: dict[tuple[str, str], list[state_pb2.RunInput]] = {}
        for run_input in await self._leases.inputs_of([claim.run for claim in claims]):
            inputs.setdefault((run_input.tenant_id, run_input.run_id), []).append(run_input)
        if claimer not in self._claimers:
            # Its stream broke while it was claimed for.
            self._doubtful.add(claimer.executor_id)
        for claim in claims:
            telemetry.logger().info(
                "run_claimed", run_id=claim.run.run_id, executor_id=claimer.executor_id, takeovers=claim.takeovers
            )
            claimer.outbox.put(
                state_pb2.ClaimedRun(
                    run=claim.run,
                    takeovers=claim.takeovers,
                    inputs=inputs.get((claim.run.tenant_id, claim.run.run_id), []),
                    handed_back=claim.handed_back,
                )
            )

    async def _end_poisoned(self) -> None:
        """Executors died on these runs, one after the other: one by one they are ended instead of handed out again."""
        while True:
            self._has_poisoned.clear()
            for key in list(self._poisoned):
                try:
                    calls = await self._read_open_calls(key)
                except (MainspringError, DecodeError) as error:
                    telemetry.logger().warning("poisoned_unread", run_id=key[1], detail=str(error)[:200])
                    # Leased to nobody who beats: when the lease is over, it is claimed to be ended again.
                    del self._poisoned[key]
                else:
                    self._poison(self._poisoned.pop(key), calls)
            await self._has_poisoned.wait()

    async def _read_open_calls(self, key: tuple[str, str]) -> dict[str, str]:
        """Reads a poisoned run's log, however long: a page at a time is held."""
        calls: dict[str, str] = {}
        seq = 0
        while seq < self._poisoned[key].run.last_seq:
            page = await self._leases.read_log(key, after_seq=seq, item_max=LOG_PAGE_MAX, byte_max=LOG_PAGE_BYTES_MAX)
            if not page:
                break
            calls = open_calls(calls, map(events_pb2.RunEvent.FromString, page))
            seq += len(page)
        return calls

    def _poison(self, claim: Claim, calls: dict[str, str]) -> None:
        run = claim.run
        append = state_pb2.Append(
            append_id=new_id(),
            tenant_id=run.tenant_id,
            run_id=run.run_id,
            expected_seq=run.last_seq,
            epoch=run.epoch,
            events=poisoned(run, calls, attempts=claim.takeovers - 1, now=self._presence.now()),
        )
        telemetry.logger().warning("run_poisoned", run_id=run.run_id, takeovers=claim.takeovers)
        self._submit(append, _ignore)


def _refusal(run_input: state_pb2.RunInput, stored: StoredInput | None) -> MainspringError:
    if stored is None:
        return refused_input(run_input, "", state=0, limit=0)
    answer = refused_answer(
        run_input.approval.approval_id,
        stored.reason,
        decision=stored.decision,
        answered_by=stored.answered_by,
        expires_time=stored.expires_time,
        role=stored.role,
    )
    return answer or refused_input(run_input, stored.reason, state=stored.state, limit=UNCONSUMED_MAX)


def _check_executor_id(executor_id: str) -> None:
    """One that no column holds would fail every statement that names all executors."""
    if not _EXECUTOR_ID.fullmatch(executor_id):
        raise MainspringError(
            Reason.REQUEST_INVALID, "executor_id has 1 to 128 characters, none of control.", field="executor_id"
        )


def _tell(heartbeat: _Heartbeat, response: state_pb2.HeartbeatResponse) -> None:
    """An executor that does not read hears it again, or beats on another stream."""
    try:
        heartbeat.outbox.put(response)
    except MainspringError as error:
        telemetry.logger().warning("executor_deaf", executor_id=heartbeat.executor_id, detail=str(error)[:200])
        heartbeat.outbox.close()


def _ignore(result: state_pb2.AppendResult) -> None:
    """Nobody waits: if the append failed, the run has moved on, or is claimed to be ended again after its lease."""
