"""A walk over errors.proto: each reason is provoked over a wire and tells what the contract promises of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TypeVar

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from mainspring_kit.errors import RULES

from tests.contract import reasons_of_waits, reasons_provoked  # noqa: F401  # they mark how reasons are provoked
from tests.contract.dispatcher_calls import Desk
from tests.contract.matrix_calls import World
from tests.contract.reasons_told import PROVOKED, Scene, Told
from tests.tidy.source import ROOT, modules
from tests.tidy.test_contracts import documented_reasons

pytestmark = [pytest.mark.contract, pytest.mark.real_services]

# What takes seconds, a thousand sockets, three dead executors or a flood: the test that provokes it.
ELSEWHERE: Mapping[str, str] = {
    "CREDENTIAL_MISSING": "tests/contract/test_execution_models.py",
    "DEPTH_EXCEEDED": "tests/contract/test_execution_tree.py",
    "HELLO_MISSING": "tests/contract/test_dispatcher_attach.py",
    "RUN_POISONED": "tests/contract/test_state_leases.py",
    "STEP_TIMED_OUT": "tests/contract/test_execution_retries.py",
    "SLOW_CONSUMER": "tests/contract/test_state_follow.py",
    "SUB_RUN_FAILED": "tests/contract/test_execution_tree.py",
    "TOO_MANY_CONNECTIONS": "tests/flow/test_gateway_socket.py",
}
# What no code raises yet, with the issue that brings it.
LATER: Mapping[str, int] = {}
# Keys that are there only in some of a reason's uses: a fault has a run where it hit one.
OPTIONAL = {"INTERNAL": {"run_id"}, "MODEL_FAILED": {"model", "retry_after_seconds"}, "RESULT_INVALID": {"answer"}}
# What was sent may have been blank, and a log's place may be wrong whatever state the run is in.
MAYBE_EMPTY = {"value", "state"}

DETAIL = TypeVar("DETAIL", bound=Message)


@pytest.fixture
async def scene(world: World) -> AsyncIterator[Scene]:
    """The module's world, with callers and workers of the test's own."""
    desk = Desk(world.wire.stack.services["dispatcher"][0], world.wire.identities)
    yield Scene(world, desk)
    await desk.close()


def details_of(told: Told, kind: type[DETAIL]) -> list[DETAIL]:
    """The details of a kind."""
    assert told.status is not None
    return [kind.FromString(found.value) for found in told.status.details if found.Is(kind.DESCRIPTOR)]


def check_details(told: Told) -> None:
    """Each code has the details that a client of it needs."""
    retry = details_of(told, error_details_pb2.RetryInfo)
    resource = details_of(told, error_details_pb2.ResourceInfo)
    precondition = details_of(told, error_details_pb2.PreconditionFailure)
    quota = details_of(told, error_details_pb2.QuotaFailure)
    assert bool(retry) == (told.code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"))
    assert all(found.retry_delay.ToNanoseconds() > 0 for found in retry)
    assert bool(resource) == (told.code == "NOT_FOUND")
    assert all(found.resource_type and found.resource_name for found in resource)
    assert bool(precondition) == (told.code == "FAILED_PRECONDITION")
    assert all(found.violations[0].type == told.reason and found.violations[0].subject for found in precondition)
    assert bool(quota) == (told.code == "RESOURCE_EXHAUSTED")
    assert all(found.violations[0].subject for found in quota)
    for bad in details_of(told, error_details_pb2.BadRequest):
        assert all(violation.field and violation.description for violation in bad.field_violations)
    if told.reason in ("REQUEST_INVALID", "SPEC_INVALID"):
        assert details_of(told, error_details_pb2.BadRequest)


def test_every_reason_is_provoked_or_comes_later() -> None:
    assert sorted([*PROVOKED, *ELSEWHERE, *LATER]) == sorted(RULES)


@pytest.mark.parametrize("reason", sorted(PROVOKED))
async def test_a_reason_tells_what_the_contract_says(scene: Scene, reason: str) -> None:
    told = await PROVOKED[reason](scene)
    code, keys, is_open = documented_reasons()[reason]
    assert told.reason == reason
    assert code in (told.code, "Any code")
    assert keys - OPTIONAL.get(reason, set()) <= set(told.metadata)
    assert is_open or set(told.metadata) <= keys
    assert all(value or key in MAYBE_EMPTY for key, value in told.metadata.items()), told.metadata
    if told.status is not None:
        check_details(told)


@pytest.mark.parametrize("reason", sorted(ELSEWHERE))
def test_what_is_provoked_elsewhere_still_is(reason: str) -> None:
    assert f'"{reason}"' in (ROOT / ELSEWHERE[reason]).read_text()


def test_what_comes_later_is_raised_nowhere() -> None:
    raised = {reason for module in modules("services", "gateway", "sdk") for reason in LATER if reason in module.text}
    assert raised == set()
