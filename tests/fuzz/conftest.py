"""One stack for all attacks, the seed that they are made from, and what they left behind, told at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings

from test_framework.loop_thread import LoopThread
from test_framework.stack import Stack, running_stack

# The same attacks in every run; another seed makes others.
SEED = int(os.environ.get("MAINSPRING_FUZZ_SEED", "20261124"))
# Attacks in `make test`, and in `make test-long`.
SHORT, LONG = 200, 5_000
# Attacks in one example of hypothesis's, made side by side.
AT_A_TIME = 10

Attack = Callable[..., None]
_told: list[str] = []


@pytest.fixture(scope="session")
def fuzz_stack() -> Iterator[Stack]:
    """A stack that only attackers use, so that its processes can be compared before and after."""
    with running_stack(private=True, extra_env={"MAINSPRING_IDLE_SECONDS": "1"}) as stack:
        yield stack


@pytest.fixture
def fuzz_loop() -> Iterator[LoopThread]:
    """Where the attacker's own connections live."""
    loop = LoopThread("attacker")
    yield loop
    loop.close()


@pytest.fixture(params=[SHORT, pytest.param(LONG, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def attacks(request: pytest.FixtureRequest) -> Callable[[Attack], Attack]:
    """Makes a test under `hypothesis.given` run with the session's seed, as often as this suite asks."""

    def decorate(attack: Attack) -> Attack:
        chosen = settings(
            max_examples=request.param // AT_A_TIME,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
        )
        found: Attack = seed(SEED)(chosen(attack))
        return found

    return decorate


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says at the end of the session what an attack left behind."""
    return lambda text: _told.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter: Any) -> None:  # Any: pytest's own
    """Prints the seed and what the attacks told."""
    if _told:
        terminalreporter.write_line("\n".join([f"fuzz: MAINSPRING_FUZZ_SEED={SEED}", *_told]))
