"""All open sockets and event streams of the process: how many there may be, their beat, and their end in a drain."""

from __future__ import annotations

import time
from collections import Counter
from typing import Protocol

from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import Principal

from mainspring_gateway.config import GatewaySettings


class Connection(Protocol):
    """A client that sees events."""

    def beat(self, monotonic_time: float, wall_time: float) -> None:
        """Once a second: looks whether the client is still there and may still be."""

    def shut(self, error: MainspringError) -> None:
        """Ends the connection with an error, soon."""


class Connections:
    """The open connections, counted by user."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._open: set[Connection] = set()
        self._per_user: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: Connection, principal: Principal) -> None:
        """Counts a connection in; TOO_MANY_CONNECTIONS at the user's bound, QUEUE_FULL at the process's."""
        user = (principal.tenant_id, principal.user_id)
        if self._per_user[user] >= self._settings.sockets_per_user_max:
            raise MainspringError(
                Reason.TOO_MANY_CONNECTIONS,
                f"You have {self._settings.sockets_per_user_max} connections open, as many as allowed: close one.",
                limit=self._settings.sockets_per_user_max,
            )
        if len(self._open) >= self._settings.sockets_max:
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"This gateway has {self._settings.sockets_max} connections and takes no more: try again.",
                queue="connections",
                limit=self._settings.sockets_max,
            )
        self._open.add(connection)
        self._per_user[user] += 1

    def leave(self, connection: Connection, principal: Principal) -> None:
        """Counts a connection out."""
        if connection in self._open:
            self._open.remove(connection)
            user = (principal.tenant_id, principal.user_id)
            self._per_user[user] -= 1
            if not self._per_user[user]:
                del self._per_user[user]

    def beat(self) -> None:
        """Passes the second's beat on."""
        monotonic_time, wall_time = time.monotonic(), time.time()
        for connection in tuple(self._open):
            connection.beat(monotonic_time, wall_time)

    def shut_all(self, error: MainspringError) -> None:
        """Ends every connection, as in a drain."""
        for connection in tuple(self._open):
            connection.shut(error)
