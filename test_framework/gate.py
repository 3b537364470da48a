"""A gate that holds tool calls in the middle: the test's end of the tool `probe.gate` (test_framework/tools.py)."""

from __future__ import annotations

import secrets
from collections import Counter
from pathlib import Path

from test_framework.agents import Spec, call, scripted_agent, step
from test_framework.waiting import wait_until

HELD_SECONDS_MAX = 60.0


class Gate:
    """A folder that the test and the worker share: who has come, who has gone through, and whether it is open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("come", "effects"):
            (folder / name).mkdir(exist_ok=True)

    @property
    def path(self) -> str:
        """What a run's input names."""
        return str(self._folder)

    def open(self) -> None:
        """Lets everybody through, from now on."""
        (self._folder / "open").touch()

    def come(self) -> Counter[str]:
        """How often each call has been executed so far, by call id."""
        return Counter(path.name.partition("~")[0] for path in (self._folder / "come").iterdir())

    def effects(self) -> list[str]:
        """The call ids whose effect has happened; a keyed tool makes one per id, so each is here once."""
        return sorted(path.name for path in (self._folder / "effects").iterdir())

    async def wait_for(self, count: int) -> None:
        """Waits until so many different calls are held."""
        await wait_until(lambda: len(self.come()) >= count, what=f"{count} calls at the gate")

    async def pass_through(self, call_id: str) -> bool:
        """The tool's end: comes, waits until the gate is open, and has its effect unless this id has had it."""
        (self._folder / "come" / f"{call_id}~{secrets.token_hex(4)}").touch()
        await wait_until((self._folder / "open").exists, HELD_SECONDS_MAX, what="the opening of the gate")
        try:
            (self._folder / "effects" / call_id).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def gated_agent() -> Spec:
    """One keyed call that is held at the gate named by `input.gate`; the result echoes `input.value`."""
    return scripted_agent(
        "gated",
        step("I go through the gate.", call("probe.gate", folder="{{input.gate}}")),
        step("I am through.", result={"answer": "{{input.value}}", "call_id": "{{calls[0].result.call_id}}"}),
    )
