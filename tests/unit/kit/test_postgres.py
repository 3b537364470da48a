"""What PostgreSQL raises: what passes by itself is no fault of ours, and what is one stays one."""

from __future__ import annotations

import asyncpg
import pytest
from mainspring_kit.errors import MainspringError
from mainspring_kit.postgres import reachable

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "raised", [asyncpg.DeadlockDetectedError, asyncpg.DiskFullError, asyncpg.AdminShutdownError, TimeoutError]
)
def test_what_passes_by_itself_is_unavailable(raised: type[Exception]) -> None:
    with pytest.raises(MainspringError) as caught, reachable():
        raise raised("for a moment")
    assert caught.value.reason_name == "PEER_UNAVAILABLE"


@pytest.mark.parametrize("raised", [asyncpg.UndefinedTableError, asyncpg.CharacterNotInRepertoireError])
def test_a_fault_stays_what_it_is(raised: type[Exception]) -> None:
    with pytest.raises(raised), reachable():
        raise raised("for ever")
