"""Tools that the tests' stacks serve: one that computes, and one that is held in the middle until a test lets it go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from mainspring.tool import ToolContext, tool

from test_framework.gate import HELD_SECONDS_MAX, Gate


@tool(name="probe.estimate", effect="pure")
def estimate(costs: dict[str, float], cuts: dict[str, float]) -> dict[str, Any]:
    """Estimates what can be saved.

    Args:
        costs: US dollars per month, by area.
        cuts: The share of each area that can be saved, 0 to 1.
    """
    savings = {area: cost * cuts.get(area, 0.0) for area, cost in costs.items()}
    saved = sum(savings.values())
    recommendations = [
        {"area": area, "saving_usd": saving, "action": f"Cut {area} by {cuts[area]:.0%}."}
        for area, saving in sorted(savings.items(), key=lambda item: -item[1])
        if saving
    ]
    return {
        "impact": {"monthly_saving_usd": saved, "share": saved / sum(costs.values())},
        "confidence": len(recommendations) / len(costs),
        "recommendations": recommendations,
    }


@tool(name="probe.gate", effect="keyed", timeout=HELD_SECONDS_MAX)
async def gate(folder: str, context: ToolContext) -> dict[str, Any]:
    """Waits at the gate in the folder until it is open; has its effect once per call id."""
    made_effect = await Gate(Path(folder)).pass_through(context.call_id)
    return {"call_id": context.call_id, "made_effect": made_effect}


@tool(name="probe.stall", effect="pure", timeout=HELD_SECONDS_MAX)
async def stall(context: ToolContext, *, attempts: int = 1) -> dict[str, int]:
    """Never ends at the first attempts, and at once at the next.

    Args:
        attempts: At so many of them.
    """
    if context.attempt <= attempts:
        await asyncio.Event().wait()
    return {"attempt": context.attempt}


@tool(name="probe.hold", effect="pure", timeout=HELD_SECONDS_MAX)
async def hold(folder: str, context: ToolContext) -> None:
    """Holds on until it is told to stop, and leaves a file in the folder that says so.

    Args:
        folder: Where.
    """
    (Path(folder) / f"{context.call_id}.begun").touch()
    try:
        await asyncio.Event().wait()
    finally:
        (Path(folder) / f"{context.call_id}.stopped").touch()
