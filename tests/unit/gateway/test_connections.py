"""Connections are counted by user and by process."""

import pytest
from mainspring_gateway.config import GatewaySettings
from mainspring_gateway.connections import Connections
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import Principal

pytestmark = pytest.mark.unit


class Recorded:
    """A connection that keeps what it is told."""

    def __init__(self) -> None:
        self.beats = 0
        self.error: MainspringError | None = None

    def beat(self, monotonic_time: float, wall_time: float) -> None:
        self.beats += 1

    def shut(self, error: MainspringError) -> None:
        self.error = error


def connections(*, per_user: int, all_users: int) -> Connections:
    return Connections(
        GatewaySettings(
            auth_secret="a" * 40,
            service_secret="s" * 40,
            sockets_per_user_max=per_user,
            sockets_max=all_users,
        )
    )


def user(name: str, tenant_id: str = "acme") -> Principal:
    return Principal(name, tenant_id, name, ("runner",), False, 1e12)


def test_a_user_has_a_bound_of_its_own_in_its_own_tenant() -> None:
    found = connections(per_user=2, all_users=10)
    first, second = Recorded(), Recorded()
    found.admit(first, user("ann"))
    found.admit(second, user("ann"))
    with pytest.raises(MainspringError, match="TOO_MANY_CONNECTIONS"):
        found.admit(Recorded(), user("ann"))
    found.admit(Recorded(), user("ann", "other"))
    found.admit(Recorded(), user("bob"))
    found.leave(first, user("ann"))
    found.leave(first, user("ann"))
    found.admit(Recorded(), user("ann"))
    with pytest.raises(MainspringError, match="TOO_MANY_CONNECTIONS"):
        found.admit(Recorded(), user("ann"))


def test_the_process_has_a_bound() -> None:
    found = connections(per_user=2, all_users=2)
    found.admit(Recorded(), user("ann"))
    found.admit(Recorded(), user("bob"))
    with pytest.raises(MainspringError, match="QUEUE_FULL"):
        found.admit(Recorded(), user("cid"))
    assert len(found) == 2


def test_all_are_told_the_beat_and_the_end() -> None:
    found = connections(per_user=9, all_users=9)
    all_open = [Recorded() for _ in range(3)]
    for number, connection in enumerate(all_open):
        found.admit(connection, user(f"user-{number}"))
    found.beat()
    error = MainspringError.__new__(MainspringError)
    found.shut_all(error)
    assert [(connection.beats, connection.error) for connection in all_open] == [(1, error)] * 3
