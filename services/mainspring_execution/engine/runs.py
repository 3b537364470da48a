"""The runs of this process: makes them durable, drives each in a task of its own, and hands all back when it ends."""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Final

from google.rpc import code_pb2
from mainspring.v1 import execution_pb2, registry_pb2, state_pb2, types_pb2
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError, Reason, from_status, to_status
from mainspring_kit.identity import DEPTH_MAX, UserExecutionContext, new_id
from mainspring_kit.interceptors import validate

from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.progress import fold
from mainspring_execution.core.record import Envelope
from mainspring_execution.core.start import NO_ORIGIN, Origin, check_run_id, make_create, read_input
from mainspring_execution.engine.catalog import PreparedAgent
from mainspring_execution.engine.drive import Drive
from mainspring_execution.engine.ending import internal_fault
from mainspring_execution.engine.making import make_drive
from mainspring_execution.engine.surroundings import Surroundings
from mainspring_execution.peers import UNREACHED

RETRY_SECONDS: Final = 0.25
# How long a start waits for the lease; callers give a start five seconds.
LEASE_WAIT_SECONDS: Final = 3.0
EARLY_INPUTS_MAX: Final = 1_024
# How long after it had no room an executor leaves it to the database who comes next: longer than a look for claims.
CROWDED_SECONDS: Final = 1.0
LINING_MAX: Final = 10_000
# State gave no verdict on a create: it may be durable, so it is sent again until there is one.
UNDECIDED: Final = (code_pb2.UNAVAILABLE, code_pb2.DEADLINE_EXCEEDED)

Reply = Callable[[execution_pb2.StartResult], None]


class Runs:
    """The runs under way, at most `runs_max`; their tasks belong to the group that `open` was given."""

    def __init__(self, surroundings: Surroundings, *, runs_max: int) -> None:
        self.is_draining = False
        self._around = surroundings
        self._runs_max = runs_max
        self._tasks: asyncio.TaskGroup | None = None
        self._drives: dict[str, Drive] = {}
        self._early_inputs: OrderedDict[str, state_pb2.RunInput] = OrderedDict()
        self._under_way = 0
        # Starts, of those under way, that only bring their runs into line.
        self._lining = 0
        self._crowded_until = float("-inf")
        self._idle = asyncio.Event()
        self._idle.set()
        self._log = telemetry.logger()

    def open(self, tasks: asyncio.TaskGroup) -> None:
        """Runs may be started from now on."""
        self._tasks = tasks

    @property
    def room(self) -> int:
        """How many runs can be driven more."""
        return 0 if self.is_draining else max(0, self._runs_max - self._under_way + self._lining)

    def start(self, item: execution_pb2.StartItem, reply: Reply, *, origin: Origin = NO_ORIGIN) -> None:
        """Starts a run; `reply` gets the one answer, when the run is durable or refused.

        Without room for it, and for a moment after, it goes to its tenant's line, from which whoever has room takes
        runs: one that began here at once would go before those that wait, whosesoever they are.
        """
        refusal = self._refuse_start()
        if refusal is not None:
            reply(_refused(item.item_id, refusal))
            return
        if not self.room:
            self._crowded_until = time.monotonic() + CROWDED_SECONDS
        is_crowded = time.monotonic() < self._crowded_until
        self._lining += is_crowded
        self.spawn(self._start(item, reply, origin=origin, queue_only=is_crowded))

    async def launch(
        self,
        append: state_pb2.Append,
        context: UserExecutionContext,
        *,
        agent: PreparedAgent,
        run: types_pb2.Run,
        state_id: str,
    ) -> MainspringError | None:
        """Makes a sub-run durable and drives it beside the caller; why not, if it was refused."""
        arrived, lapses = time.perf_counter(), self._around.lease.lapses
        context = replace(context, run_id=run.run_id, request_id=new_id(), depth=run.depth)
        answer = await self._post(append, state_id, may_be_durable=True)
        if answer.status.code != code_pb2.OK:
            return from_status(answer.status)
        drive = make_drive(
            self._around,
            context,
            launcher=self,
            agent=agent,
            run=run,
            state_id=state_id,
            arrived=arrived,
            lapses=lapses,
            progress=fold(append.events),
        )
        self.spawn(self.drive(drive))
        return None

    def spawn(self, driving: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine that drives one run (Any: as Python types coroutines), counted until it ends."""
        assert self._tasks is not None, "runs are spawned once the group is open"
        self._under_way += 1
        self._idle.clear()
        self._tasks.create_task(driving).add_done_callback(self._leave)

    async def drive(self, drive: Drive) -> None:
        """Drives a run to its end here; of two drives of the same run the one of the older epoch is given up."""
        run_id = drive.run_id
        former = self._drives.get(run_id)
        if former is not None and former.epoch > drive.epoch:
            # A claim or a create that was late on its way.
            drive.attention.abandon()
            return
        if former is not None:
            former.attention.abandon()
        self._drives[run_id] = drive
        early = self._early_inputs.pop(run_id, None)
        if early is not None:
            drive.attention.hear(early)
        if self.is_draining:
            drive.attention.leave()
        try:
            await drive.run()
        finally:
            if self._drives.get(run_id) is drive:
                del self._drives[run_id]
        self._log.info(drive.outcome, **drive.summary())

    def take_input(self, request: state_pb2.RunInput) -> None:
        """Hands an input to its run, or keeps it for the run that is just being created or taken over."""
        drive = self._drives.get(request.run_id)
        if drive is not None:
            drive.attention.hear(request)
            return
        # Only one for each, and best a cancel: state tells what is not consumed again in a moment.
        if request.HasField("cancel") or request.run_id not in self._early_inputs:
            self._early_inputs[request.run_id] = request
        if len(self._early_inputs) > EARLY_INPUTS_MAX:
            self._early_inputs.popitem(last=False)

    async def drain(self, seconds: float) -> None:
        """Starts no more, gives each run back when its step is done, and after so many seconds gives the others up."""
        self.is_draining = True
        for drive in self._drives.values():
            drive.attention.leave()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            self._log.info("runs_given_up", count=len(self._drives))
        for drive in self._drives.values():
            drive.attention.abandon()

    def _leave(self, _: asyncio.Task[None]) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()

    def _refuse_start(self) -> MainspringError | None:
        if self.is_draining:
            return draining()
        if self._tasks is None:
            return _no_lease()
        if self._lining >= LINING_MAX:
            return MainspringError(
                Reason.QUEUE_FULL,
                f"{LINING_MAX} starts are on their way into line here: try again in a moment.",
                queue="runs",
                limit=LINING_MAX,
            )
        return None

    async def _start(self, item: execution_pb2.StartItem, reply: Reply, *, origin: Origin, queue_only: bool) -> None:
        drive = None
        try:
            result, drive = await self._create(item, origin, queue_only=queue_only)
        except MainspringError as error:
            result = _refused(item.item_id, error)
        except Exception as fault:  # a fault of ours in one start must not end the others
            self._log.error("start_faulted", run_id=item.context.run_id, exc_info=fault)
            result = _refused(item.item_id, internal_fault(item.context.run_id))
        finally:
            self._lining -= queue_only
        reply(result)
        if drive is not None:
            await self.drive(drive)

    async def _await_lease(self) -> None:
        """After a restart of state its first answered beat takes a moment: starts wait for it, counted as under way."""
        try:
            async with asyncio.timeout(LEASE_WAIT_SECONDS):
                await self._around.lease.wait_held()
        except TimeoutError as error:
            raise _no_lease() from error

    async def _create(
        self, item: execution_pb2.StartItem, origin: Origin, *, queue_only: bool
    ) -> tuple[execution_pb2.StartResult, Drive | None]:
        """Makes a run durable; with the drive of it if it is this process's to drive."""
        arrived = time.perf_counter()
        validate(item)
        if not self._around.lease.is_held:
            await self._await_lease()
        start = item.start
        asked_session_id = start.session_id or item.context.session_id
        context = _read_context(item)
        check_run_id(context.run_id)
        input_json = read_input(start.input)
        agent = await self._around.catalog.resolve(context, start.agent, alias=start.alias, version=start.version)
        append, run = _make_append(
            item,
            context,
            plan=agent.plan,
            asked_session_id=asked_session_id,
            input_json=input_json,
            executor_id=self._around.lease.executor_id,
            limits=await self._around.catalog.limits_of(context),
            queue_only=queue_only,
            origin=origin,
        )
        state_id = self._around.state.appends.pick_instance(item.state_id) or item.state_id
        lapses = self._around.lease.lapses
        answer = await self._post(append, state_id)
        result = execution_pb2.StartResult(
            item_id=item.item_id,
            run_id=answer.run_id,
            state=answer.state,
            repeated_key=answer.repeated_key,
            followed=answer.followed,
        )
        if answer.status.code != code_pb2.OK:
            return await self._find_existing(item.item_id, context, refusal=from_status(answer.status)), None
        if answer.repeated_key or answer.state != types_pb2.RUN_STATE_RUNNING:
            return result, None
        run.ordinal = answer.ordinal
        drive = make_drive(
            self._around,
            context,
            launcher=self,
            agent=agent,
            run=run,
            state_id=state_id,
            arrived=arrived,
            lapses=lapses,
            progress=fold(append.events),
        )
        return result, drive

    async def _post(
        self, append: state_pb2.Append, state_id: str, *, may_be_durable: bool = False
    ) -> state_pb2.AppendResult:
        """Appends until there is a verdict: a create without one may have made this process its holder.

        Then a full queue is no verdict either; a full backlog is one, as it is only said of what was not made.
        """
        while True:
            try:
                answer = await self._around.state.appends.post(append, instance_id=state_id)
            except MainspringError:
                if not may_be_durable:
                    raise
            else:
                code = answer.status.code
                is_full = code == code_pb2.RESOURCE_EXHAUSTED and from_status(answer.status).reason_name == "QUEUE_FULL"
                if code not in UNDECIDED and not (may_be_durable and is_full):
                    return answer
                may_be_durable = True
            await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))

    async def _find_existing(
        self, item_id: int, context: UserExecutionContext, *, refusal: MainspringError
    ) -> execution_pb2.StartResult:
        """A start that was sent again is answered with the run that its first sending made."""
        if refusal.reason_name not in ("RUN_EXISTS", "APPEND_STALE"):
            raise refusal
        try:
            run = await self._around.state.get_run(context, context.run_id)
        except MainspringError as error:
            if error.code in UNREACHED:
                raise
            # Somebody else's run: whose is not told.
            raise refusal from error
        return execution_pb2.StartResult(item_id=item_id, run_id=run.run_id, state=run.state)


def _no_lease() -> MainspringError:
    return MainspringError(
        Reason.PEER_UNAVAILABLE,
        "This executor has no lease from state now and may start nothing: try again in a moment.",
        peer="state",
    )


def draining() -> MainspringError:
    """DRAINING: this process takes nothing new."""
    return MainspringError(
        Reason.DRAINING, "This executor is leaving: send the start to another one.", peer="execution"
    )


def _read_context(item: execution_pb2.StartItem) -> UserExecutionContext:
    """For whom the run is; a session of its own where none is named, and room for the contexts of its calls."""
    asked = item.context
    asked.session_id = item.start.session_id or asked.session_id or asked.run_id
    context = UserExecutionContext.from_message(asked)
    return context if context.depth < DEPTH_MAX else context.child()


def _make_append(
    item: execution_pb2.StartItem,
    context: UserExecutionContext,
    *,
    plan: AgentPlan,
    asked_session_id: str,
    input_json: bytes,
    executor_id: str,
    limits: registry_pb2.TenantLimits,
    queue_only: bool,
    origin: Origin,
) -> tuple[state_pb2.Append, types_pb2.Run]:
    now = time.time()
    envelope = Envelope(context.run_id, context.session_id, plan.agent, context.trace_id)
    create, started = make_create(
        plan,
        item.start,
        envelope=envelope,
        user_id=context.user_id,
        asked_session_id=asked_session_id,
        input_json=input_json,
        executor_id=executor_id,
        follower_id=item.follower_id,
        now=now,
        limits=limits,
        queue_only=queue_only,
        origin=origin,
    )
    started.append_id = new_id()
    append = state_pb2.Append(
        append_id=started.append_id,
        tenant_id=context.tenant_id,
        run_id=context.run_id,
        epoch=1,
        events=[started],
        create=create,
    )
    run = types_pb2.Run(
        run_id=context.run_id, agent=plan.agent, agent_version=plan.version, deadline=create.deadline, epoch=1
    )
    run.create_time.FromMicroseconds(int(now * 1e6))
    return append, run


def _refused(item_id: int, error: MainspringError) -> execution_pb2.StartResult:
    return execution_pb2.StartResult(item_id=item_id, status=to_status(error))
