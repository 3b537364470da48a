"""Runs that nobody drives: claims them from the state instance that beats go to, and takes each up from its log."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Final

import grpc
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import UserExecutionContext, new_id
from mainspring_kit.tasks import raise_if_cancelled

from mainspring_execution.core.decision import check_takeover
from mainspring_execution.core.progress import fold
from mainspring_execution.engine.catalog import PreparedAgent
from mainspring_execution.engine.making import make_drive
from mainspring_execution.engine.runs import Runs
from mainspring_execution.engine.surroundings import Surroundings
from mainspring_execution.peers import UNREACHED, ClaimCall

CREDIT_MAX: Final = 10_000
RETRY_SECONDS: Final = 0.25
# How soon a process that was full looks whether it has room again: runs may stand in line.
FULL_SECONDS: Final = 0.04
FAULT_SECONDS: Final = 3.0
UNKNOWN_LAPSES: Final = -1


class Claims:
    """Claims as many runs as there is room for, as long as `run` is awaited."""

    def __init__(self, surroundings: Surroundings, runs: Runs) -> None:
        self._around = surroundings
        self._runs = runs
        self._claimed = 0
        self._call: ClaimCall | None = None

    def stop(self) -> None:
        """Takes no more, so that what this process hands back does not come to it again: ends the task of `run`."""
        if self._call is not None:
            self._call.cancel()

    async def run(self) -> None:
        """Keeps a stream of claims open while this process may drive more."""
        lease = self._around.lease
        while not self._runs.is_draining:
            is_full = not self._runs.room
            if lease.is_held and lease.address and self._runs.room:
                try:
                    is_full = await self._claim(lease.address)
                except grpc.aio.AioRpcError as error:
                    telemetry.logger().info("claims_broken", address=lease.address, code=error.code().name)
                raise_if_cancelled()
            await asyncio.sleep((FULL_SECONDS if is_full else RETRY_SECONDS) * random.uniform(0.5, 1.0))

    async def _claim(self, address: str) -> bool:
        """Takes runs from one stream while there is room; state counts what was claimed here against the credit.

        True: there is no room any more; False: the stream has ended.
        """
        credit = min(CREDIT_MAX, self._claimed + self._runs.room)
        executor_id = self._around.lease.executor_id
        call = self._call = self._around.state.open_claims(address, executor_id=executor_id, credit=credit)
        try:
            async for response in call:
                for claimed in response.runs:
                    self._runs.spawn(self._take_over(claimed))
                if not self._runs.room:
                    return True
        finally:
            self._call = None
            call.cancel()
        return False

    async def _take_over(self, claimed: state_pb2.ClaimedRun) -> None:
        """Takes a claimed run up where its log ends, again and again if that fails: the run is nobody else's now."""
        self._claimed += 1
        try:
            while not await self._try_to_drive(claimed):
                raise_if_cancelled()
                await asyncio.sleep(FAULT_SECONDS * random.uniform(0.5, 1.0))
        finally:
            self._claimed -= 1

    async def _try_to_drive(self, claimed: state_pb2.ClaimedRun) -> bool:
        try:
            await self._drive(claimed)
        except Exception as fault:  # a fault of ours in one run must not end the others
            telemetry.logger().error("takeover_faulted", run_id=claimed.run.run_id, exc_info=fault)
            return False
        return True

    async def _drive(self, claimed: state_pb2.ClaimedRun) -> None:
        arrived = time.perf_counter()
        run = claimed.run
        context = UserExecutionContext(
            tenant_id=run.tenant_id,
            user_id=run.user_id,
            session_id=run.session_id,
            run_id=run.run_id,
            request_id=new_id(),
            trace_id=run.trace_id,
            depth=run.depth,
        )
        progress = fold(await self._read_log(context, run))
        agent: PreparedAgent | MainspringError | None = None
        # One that waits or is paused was held by nobody.
        was_driven = progress.started and run.state == types_pb2.RUN_STATE_RUNNING
        if was_driven and not claimed.handed_back:
            agent = check_takeover(progress, run_id=run.run_id)
        if progress.agent:
            name, version = progress.agent, progress.agent_version
        else:
            name, version = run.agent, run.agent_version
        agent = agent or await self._recall_agent(context, name, version=version)
        drive = make_drive(
            self._around,
            context,
            launcher=self._runs,
            agent=agent,
            run=run,
            state_id=self._around.state.appends.pick_instance(),
            arrived=arrived,
            # The first append says whether the claim still holds; a run that waited may call first.
            lapses=self._around.lease.lapses if was_driven or not progress.started else UNKNOWN_LAPSES,
            progress=progress,
        )
        if was_driven:
            drive.record_recovery(
                attempt=claimed.takeovers,
                executor_id=self._around.lease.executor_id,
                handed_back=claimed.handed_back,
            )
        for request in claimed.inputs:
            drive.attention.hear(request)
        telemetry.logger().info("run_claimed", run_id=run.run_id, epoch=run.epoch, takeovers=claimed.takeovers)
        await self._runs.drive(drive)

    async def _read_log(self, context: UserExecutionContext, run: types_pb2.Run) -> list[events_pb2.RunEvent]:
        if not run.last_seq:
            return []
        while True:
            try:
                return await self._around.state.read_events(context, run.run_id)
            except MainspringError as error:
                if error.code not in UNREACHED:
                    raise
            raise_if_cancelled()
            await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))

    async def _recall_agent(
        self, context: UserExecutionContext, name: str, *, version: str
    ) -> PreparedAgent | MainspringError:
        """The version that the run goes on with; an error is what the run then fails with."""
        while True:
            try:
                return await self._around.catalog.recall(context, name, version=version)
            except MainspringError as error:
                if error.code not in UNREACHED:
                    return error
            raise_if_cancelled()
            await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))
