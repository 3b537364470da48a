"""What the database says about a batch: whose fault it is decides whether a run ends over it."""

from __future__ import annotations

import asyncpg
import pytest
from mainspring_state.store.log import is_conflict, is_shortage

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "raised", [asyncpg.DiskFullError, asyncpg.ReadOnlySQLTransactionError, asyncpg.PostgresIOError]
)
def test_what_the_database_lacks_is_no_appends_fault(raised: type[asyncpg.PostgresError]) -> None:
    assert is_shortage(raised("for a while"))


@pytest.mark.parametrize("raised", [asyncpg.DeadlockDetectedError, asyncpg.UniqueViolationError])
def test_a_quicker_process_is_met_again(raised: type[asyncpg.PostgresError]) -> None:
    assert is_conflict(raised("at this moment")) and not is_shortage(raised("at this moment"))


def test_a_value_is_its_own_appends_fault() -> None:
    error = asyncpg.CharacterNotInRepertoireError("NUL")
    assert not is_conflict(error) and not is_shortage(error)
