"""Who watches a stack start and live. The command line's shows it; by default nobody does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mainspring.dev.child import Child


class Witness(Protocol):
    """What can be seen of a stack from outside."""

    def step(self, what: str) -> AbstractContextManager[None]:
        """A step of the start is under way within the block, and done when the block ends without an error."""
        ...

    def serving(self, child: Child, *, seconds: float) -> None:
        """A process serves, so long after its start."""

    def ended(self, child: Child, *, returncode: int, restart_seconds: float) -> None:
        """A process died unasked and starts again after so long."""


class Silent:
    """Watches, and says nothing."""

    def step(self, what: str) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def serving(self, child: Child, *, seconds: float) -> None:
        """Nothing."""

    def ended(self, child: Child, *, returncode: int, restart_seconds: float) -> None:
        """Nothing."""
