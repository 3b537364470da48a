"""A follower at the moment when its stream ends: whoever still writes to it is not harmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from mainspring.v1 import state_pb2
from mainspring_kit.identity import Caller, Principal
from mainspring_kit.streams import call_tasks
from mainspring_state.core.drafts import Drafts
from mainspring_state.engine.follower import Follower, FollowLimits, Sources
from mainspring_state.engine.hub import Hub

pytestmark = pytest.mark.unit

GATEWAY = Caller(Principal("gateway", "", "", ("service",), True, 0.0), None)


async def silence() -> AsyncIterator[state_pb2.FollowRequest]:
    """A caller that sends nothing and stays."""
    await asyncio.Event().wait()
    yield state_pb2.FollowRequest()


async def break_off() -> None:
    raise ConnectionResetError


async def test_a_run_made_for_a_follower_whose_call_is_ending_is_left_alone() -> None:
    # Any: no event is read.
    nothing: Any = None
    sources = Sources(Hub(runs_max=1, bytes_max=1, drafts=Drafts(bytes_max=1)), nothing, nothing, asyncio.Semaphore(1))
    with pytest.raises(ExceptionGroup) as ended:
        async with asyncio.TaskGroup() as tasks:
            call_tasks.set(tasks)
            follower = Follower(sources, FollowLimits(16, 1 << 20, 16), caller=GATEWAY, state_id="s")
            stream = cast(Any, follower.follow(silence()))
            await anext(stream)
            tasks.create_task(break_off())
            try:
                await asyncio.Event().wait()
            finally:
                # As the committer does when a create comes again; it serves all other runs too.
                follower.catch_up(("acme", "run-1"), "ann")
    await stream.aclose()
    assert [type(error) for error in ended.value.exceptions] == [ConnectionResetError]
