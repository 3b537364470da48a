"""Stacks for tests that kill: one for all tests of a module, embedded, nobody else's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from test_framework.gate import Gate
from test_framework.identities import make_context
from test_framework.stack import Stack, running_stack
from test_framework.user import User


@pytest.fixture(scope="module")
def flow_stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The module's own stack; its `replicas`, where it has some, say how many of which process."""
    with running_stack(private=True, replicas=getattr(request.module, "replicas", None)) as stack:
        yield stack


@pytest.fixture
async def healthy_stack(flow_stack: Stack) -> Stack:
    """The module's stack once everything that an earlier test has killed serves again."""
    await flow_stack.wait_ready()
    return flow_stack


@pytest.fixture
async def user(healthy_stack: Stack) -> AsyncIterator[User]:
    """A user of the test's own on the module's stack."""
    someone = User(healthy_stack, make_context())
    yield someone
    await someone.close()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """What holds tool calls in the middle until the test opens it; opened at the end in any case."""
    held = Gate(tmp_path)
    yield held
    held.open()
