"""Who watches a stack start and live. The command line's shows it; by default nobody does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mainspring.dev.child import Child


class Witness(Protocol):
    """What can be seen of a stack from outside."""

    def step_began(self, what: str) -> None:
        """A step of the start is under way."""

    def step_ended(self, what: str, *, seconds: float) -> None:
        """The step is done."""

    def serving(self, child: Child, *, seconds: float) -> None:
        """A process serves, so long after its start."""

    def ended(self, child: Child, *, returncode: int, restart_seconds: float) -> None:
        """A process died unasked and starts again after so long."""


class Silent:
    """Watches, and says nothing."""

    def step_began(self, what: str) -> None:
        """Nothing."""

    def step_ended(self, what: str, *, seconds: float) -> None:
        """Nothing."""

    def serving(self, child: Child, *, seconds: float) -> None:
        """Nothing."""

    def ended(self, child: Child, *, returncode: int, restart_seconds: float) -> None:
        """Nothing."""
