"""The runs of the drill: what each does, what its client has seen of it, and the mix in which they are started."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

TERMINAL: Final = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})
COUNT_TOOL: Final = "diagnostics.count"
# Events of a run of the mix, by those of a look-up run: what half of W1's peak is divided by.
MIX_WEIGHT: Final = 1.4
MARKED_SHARE: Final = 0.1
SLEEP_SECONDS: Final = (0.1, 0.6)
MODEL_SECONDS: Final = 0.1
# At which of its events the database refuses a marked run.
REFUSED_AT: Final = ("agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed")

_TIMEOUT: Final = "10m"


@dataclass(slots=True)
class Seen:
    """The log of one run as frames told it: `digests`, `times` and `types` of seq 1, 2, 3 … as each first came."""

    digests: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    types: list[str] = field(default_factory=list)

    @property
    def last_seq(self) -> int:
        """How far it is known without a gap."""
        return len(self.digests)

    @property
    def has_ended(self) -> bool:
        """Whether its terminal event came."""
        return bool(self.types) and self.types[-1] in TERMINAL


@dataclass(slots=True, eq=False)
class Run:
    """One start under an idempotency key. `counts`: how many keyed calls it makes; `pause_seconds`: its longest rest.

    Times are the loop's, in seconds.
    """

    key: str
    user: str
    start: bytes
    counts: int
    pause_seconds: float
    refused_at: str = ""
    run_id: str = ""
    asked_time: float = 0.0
    acknowledged_time: float = 0.0
    refusal: str = ""
    seen: Seen = field(default_factory=Seen)


def agents() -> list[bytes]:
    """The specifications of the agents, besides the look-up."""
    count = {"tool": COUNT_TOOL, "arguments": {"file": "{{input.file}}"}}
    echo = {"tool": "diagnostics.echo", "arguments": {"value": "{{input.value}}"}}
    sleep = {"tool": "diagnostics.sleep", "arguments": {"seconds": "{{input.seconds}}"}}
    delay = f"{int(MODEL_SECONDS * 1e3)}ms"
    return [
        _agent(
            "faults-plain",
            {"text": "I look it up.", "calls": [echo]},
            {"text": "Done.", "result": {"answer": "{{calls[0].result.value}}"}},
        ),
        _agent(
            "faults-counted",
            {"text": "One.", "calls": [count]},
            {"text": "And.", "calls": [echo]},
            {"text": "Two.", "calls": [count]},
            {"text": "Done.", "result": {"answer": "{{calls[2].result.call_id}}"}},
        ),
        _agent(
            "faults-slow",
            {"text": "I wait.", "delay": delay, "calls": [sleep]},
            {"text": "I count.", "delay": delay, "calls": [count]},
            {"text": "Done.", "delay": delay, "result": {"answer": "{{calls[1].result.call_id}}"}},
        ),
    ]


class Mix:
    """Draws runs: half of them plain, three in ten with two keyed calls, two in ten slow with one."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._last = 0

    def draw(self, user: str, file: str, *, marked: bool) -> Run:
        """The next run of a user, whose effects go to `file`. Some are marked when the database refuses marked ones."""
        self._last += 1
        key = f"{user}-{self._last}"
        refused_at = self._chance.choice(REFUSED_AT) if marked and self._chance.random() < MARKED_SHARE else ""
        share = self._chance.random()
        if refused_at or share < 0.5:
            value = mark(refused_at) if refused_at else key
            return Run(key, user, _start(key, "faults-plain", value=value), 0, 0.0, refused_at)
        if share < 0.8:
            return Run(key, user, _start(key, "faults-counted", value=key, file=file), 2, 0.0)
        seconds = round(self._chance.uniform(*SLEEP_SECONDS), 3)
        return Run(key, user, _start(key, "faults-slow", seconds=seconds, file=file), 1, max(seconds, MODEL_SECONDS))


def mark(event_type: str) -> str:
    """What a run's values hold that the database refuses in events of this type."""
    return f"refuse-{event_type}"


def _start(key: str, agent: str, **given: object) -> bytes:
    return orjson.dumps({"op": "start", "id": key, "agent": agent, "input": given, "idempotency_key": key})


def _agent(name: str, *script: Mapping[str, Any]) -> bytes:
    """Any: JSON."""
    tools = sorted({call["tool"] for step in script for call in step.get("calls", ())})
    return orjson.dumps(
        {
            "apiVersion": "mainspring/v1",
            "kind": "Agent",
            "name": name,
            "description": "An agent of the fault drill.",
            "model": {"provider": "scripted", "script": script},
            "tools": tools,
            "limits": {"timeout": _TIMEOUT, "max_steps": 10},
        }
    )
