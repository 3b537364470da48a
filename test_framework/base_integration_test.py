"""The base class of integration tests: awaited hooks, and clean-ups that all run, last first, whatever fails."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from test_framework.identities import UserExecutionContext, make_context
from test_framework.stack import Stack
from test_framework.user import User

Cleanup = Callable[[], Awaitable[object] | object]


class BaseIntegrationTest:
    """Override `async_setup` and `async_teardown`; register what must be undone with `add_cleanup`.

    Order: async_setup, the test, async_teardown, the clean-ups last-in-first-out. Each failure is reported, the rest
    still runs; after a failed set-up the clean-ups run as well.
    """

    _cleanups: list[Cleanup]

    async def async_setup(self) -> None:
        """Runs before each test."""

    async def async_teardown(self) -> None:
        """Runs after each test, before the clean-ups."""

    def add_cleanup(self, cleanup: Cleanup) -> None:
        """Runs `cleanup` (plain or async) after the test; the last one added runs first."""
        self._cleanups.append(cleanup)

    async def open_user(self, stack: Stack, context: UserExecutionContext | None = None) -> User:
        """A user of the test's own on the running stack; closed after the test."""
        user = User(stack, context or make_context())
        self.add_cleanup(user.close)
        return user

    @pytest.fixture(autouse=True)
    async def _hooks(self) -> AsyncIterator[None]:
        self._cleanups = []
        try:
            await self.async_setup()
            yield
        finally:
            await self._end()

    async def _end(self) -> None:
        self.add_cleanup(self.async_teardown)
        errors: list[Exception] = []
        while self._cleanups:
            try:
                answer = self._cleanups.pop()()
                if inspect.isawaitable(answer):
                    await answer
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup(f"{len(errors)} clean-ups failed, the others ran", errors)
