"""What users of a history want: runs of agents that play a script, and what they do to these runs meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from tests.simulation.parts import TOOLS

# As in a script: a tool, and what it is called with. So that some stay with their executor and some are given back.
WAITS = (
    "run.sleep:0.3",
    "run.sleep:2.5",
    "run.wait_for_signal",
    "run.wait_for_signal",
    "run.wait_for_signal:2.5",
    "human.approve",
    "human.approve",
    "human.approve:2.5",
    "agent.quick:pure",
    "agent.slow:unsafe",
    "handoff.slow",
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What one client wants: a run of this agent and script, with these mishaps. Times in seconds after its start."""

    number: int
    tenant_id: str
    user_id: str
    session_id: str
    agent: str
    script: list[list[str]]
    key: str
    start_time: float
    # Starts once more with the same key although it has an answer.
    repeats: bool = False
    cancel_after: float | None = None
    # When it is to stand still, and for how long.
    pauses: list[tuple[float, float]] = field(default_factory=list)
    # When it is sent a signal, and which.
    signals: list[tuple[float, str]] = field(default_factory=list)


def make_wishes(rng: Random) -> list[Wish]:
    """One to three wishes."""
    wishes: list[Wish] = []
    for number in range(1, rng.choice((1, 2, 2, 3, 3)) + 1):
        former = rng.choice(wishes) if wishes and rng.random() < 0.2 else None
        if former is not None:
            # Two clients of one user start the same at about the same time.
            start_time = former.start_time + rng.random() * 0.1
            again = replace(former, number=number, start_time=start_time, repeats=False, cancel_after=None)
            wishes.append(replace(again, pauses=[], signals=[]))
        else:
            wishes.append(_make_wish(rng, number))
    return wishes


def _make_wish(rng: Random, number: int) -> Wish:
    wait_share = rng.choice((0.0, 0.0, 0.2, 0.5))
    script = [
        [_choose_call(rng, wait_share) for _ in range(rng.choice((0, 1, 1, 2)))]
        for _ in range(rng.choice((1, 2, 2, 3)))
    ]
    user_id = rng.choice(("ann", "bob"))
    tools = [call for calls in script for call in calls]
    return Wish(
        number=number,
        tenant_id="acme",
        user_id=user_id,
        session_id=f"talk-{user_id}-{rng.choice((1, number))}",
        agent=rng.choice(("quick", "quick", "slow", "slow", "late", "capped")),
        script=script,
        key=f"key-{number}",
        start_time=0.1 + rng.random() ** 2 * 2.5,
        repeats=rng.random() < 0.2,
        cancel_after=rng.random() * 2.0 if rng.random() < 0.2 else None,
        pauses=[(rng.random() * 2.0, rng.random() * 2.0) for _ in range(rng.choice((0, 0, 0, 0, 1, 2)))],
        # Enough for those that would wait for ever; of the others some.
        signals=[(rng.random() * 3.0, "go") for tool in tools if tool == "run.wait_for_signal"]
        + [(rng.random() * 4.0, "maybe") for tool in tools if tool == "run.wait_for_signal:2.5" and rng.random() < 0.6],
    )


def _choose_call(rng: Random, wait_share: float) -> str:
    return rng.choice(WAITS if rng.random() < wait_share else TOOLS)
