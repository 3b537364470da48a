"""Checks of results against an agent's output_schema that hold no other run up, however long they take."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from mainspring_kit.errors import MainspringError

from mainspring_execution.core.decision import check_result, result_unchecked
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.schema import TooCostlyError

# A step takes some 20 µs. Checks that take more than a moment go on in a thread, one after the other, so that however
# many there are the loop has half of the time.
STEPS_AT_ONCE: Final = 500
STEPS_MAX: Final = 100_000

_CHECKS: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checks")


async def check(plan: AgentPlan, result: bytes) -> MainspringError | None:
    """RESULT_INVALID, or nothing."""
    try:
        return check_result(plan, result, steps_max=STEPS_AT_ONCE)
    except TooCostlyError:
        pass
    at_length = partial(check_result, plan, result, steps_max=STEPS_MAX)
    try:
        return await asyncio.get_running_loop().run_in_executor(_CHECKS, at_length)
    except TooCostlyError:
        return result_unchecked(plan)
