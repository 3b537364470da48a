"""Tools that tests, drills and benchmarks call: they show what the platform does, and serve development only."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections import OrderedDict
from typing import Annotated, Any, Final

from pydantic import Field

from mainspring.errors import ToolError
from mainspring.tool import TIMEOUT_SECONDS_MAX, ToolContext, tool

_RUNS_MAX: Final = 10_000
# How often `fail` has failed, by tenant and run; each worker process counts its own.
_failures: Final[OrderedDict[tuple[str, str], int]] = OrderedDict()


@tool(name="diagnostics.echo", effect="pure")
async def echo(**arguments: Any) -> dict[str, Any]:
    """Returns its arguments."""
    return arguments


@tool(name="diagnostics.sleep", effect="pure", timeout=TIMEOUT_SECONDS_MAX)
async def sleep(seconds: Annotated[float, Field(ge=0, le=TIMEOUT_SECONDS_MAX)]) -> dict[str, float]:
    """Waits; a cancel ends it at once.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return {"seconds": seconds}


@tool(name="diagnostics.fail", effect="pure")
async def fail(
    context: ToolContext,
    code: str = "UNKNOWN",
    *,
    message: str = "It was told to fail.",
    times: int | None = None,
    retry_after_seconds: float | None = None,
) -> dict[str, int]:
    """Fails, as often in a run as it is told, then succeeds.

    Args:
        code: The gRPC code to fail with.
        message: The message to fail with.
        times: How often in this run; always when not given.
        retry_after_seconds: How long it asks to be left alone each time.
    """
    run = (context.tenant_id, context.run_id)
    failed = _failures.get(run, 0)
    if times is not None and failed >= times:
        return {"failed": failed}
    _failures[run] = failed + 1
    _failures.move_to_end(run)
    if len(_failures) > _RUNS_MAX:
        _failures.popitem(last=False)
    metadata = {} if retry_after_seconds is None else {"retry_after_seconds": retry_after_seconds}
    raise ToolError(message, code=code, metadata=metadata)


@tool(name="diagnostics.count", effect="keyed")
def count(file: str, context: ToolContext, *, name: str = "diagnostics.count") -> dict[str, str]:
    """Appends the line `name call_id` to a file, once per call, whatever dies between.

    Args:
        file: The file's path on the worker's machine.
        name: The line's first word.
    """
    line = f"{name} {context.call_id}\n".encode()
    handle = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # Two workers may have the call at once, one of them given up for dead: the second finds the line of the first.
        fcntl.flock(handle, fcntl.LOCK_EX)
        with os.fdopen(os.dup(handle), "rb") as reader:
            lines = reader.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            # Whoever wrote it died within the write: it does not count.
            os.ftruncate(handle, sum(len(known) for known in lines[:-1]))
        if line not in lines:
            os.write(handle, line)
            os.fsync(handle)
    finally:
        os.close(handle)  # gives the lock back
    return {"name": name, "call_id": context.call_id}
