"""Tools of the execution tests: one whose second call would do harm, and one that computes nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mainspring.errors import ToolError
from mainspring.tool import ToolContext, tool

from test_framework.gate import HELD_SECONDS_MAX, Gate


@tool(name="probe.launch", effect="unsafe", timeout=HELD_SECONDS_MAX)
async def launch(folder: str, context: ToolContext) -> dict[str, Any]:
    """Waits at the gate in the folder until it is open, then launches."""
    made_effect = await Gate(Path(folder)).pass_through(context.call_id)
    return {"call_id": context.call_id, "made_effect": made_effect}


def _fail(folder: str, context: ToolContext, *, times: int) -> dict[str, Any]:
    """Notes the attempt, and fails in passing so many times."""
    notes = Path(folder) / "attempts"
    with notes.open("a") as lines:
        lines.write(f"{context.call_id} {context.attempt}\n")
    if len(notes.read_text().splitlines()) <= times:
        raise ToolError("The line is busy: try again.", code="UNAVAILABLE", reason="LINE_BUSY", metadata={"line": 7})
    return {"call_id": context.call_id}


@tool(name="probe.order", effect="keyed")
def order(folder: str, context: ToolContext, *, times: int = 1000) -> dict[str, Any]:
    """Orders, after so many failures."""
    return _fail(folder, context, times=times)


@tool(name="probe.ignite", effect="unsafe")
def ignite(folder: str, context: ToolContext, *, times: int = 1000) -> dict[str, Any]:
    """Ignites, after so many failures."""
    return _fail(folder, context, times=times)
