"""Tools of the execution tests: one whose second call would do harm, and one that computes nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mainspring.tool import ToolContext, tool

from test_framework.gate import HELD_SECONDS_MAX, Gate


@tool(name="probe.launch", effect="unsafe", timeout=HELD_SECONDS_MAX)
async def launch(folder: str, context: ToolContext) -> dict[str, Any]:
    """Waits at the gate in the folder until it is open, then launches."""
    made_effect = await Gate(Path(folder)).pass_through(context.call_id)
    return {"call_id": context.call_id, "made_effect": made_effect}
