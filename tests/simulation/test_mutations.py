"""Histories find faults: each of these, put into the product, breaks an invariant in some history."""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS
from tests.simulation.test_histories import run_simulation

pytestmark = [pytest.mark.simulation, pytest.mark.long]

HISTORIES_MAX = "1000"


@pytest.mark.timeout(320)
@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_a_fault_is_found(mutation: str) -> None:
    arguments = ("1", "--histories", HISTORIES_MAX, "--processes", "2", "--first", "--mutation", mutation)
    code, output = run_simulation(*arguments, timeout_seconds=300)
    assert code == 1, output
    assert "to see it: python -m tests.simulation" in output
