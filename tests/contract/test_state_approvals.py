"""Approvals over the wire: who sees them, who may answer, and that the first answer wins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import pytest
from mainspring.v1 import state_pb2, state_pb2_grpc, types_pb2
from mainspring_kit.identity import UserExecutionContext, new_id

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities
from test_framework.loop_thread import LoopThread
from tests.contract.state_calls import TIMEOUT, Executor, cancelled, claiming, completed, person, reason_of
from tests.contract.state_inputs import (
    ALLOW,
    DENY,
    EXPIRED,
    RELEASE,
    WAITING,
    WITHDRAWN,
    Asker,
    ask_person,
    asking,
    moment,
    resolved,
    waiting,
)
from tests.contract.state_processes import serving

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.

ROLES = ("runner", "operator", "admin")


@pytest.fixture
def ann(aio_stub: Any, identities: Identities, user: UserExecutionContext) -> Asker:
    """The run's user."""
    return Asker(aio_stub, identities, user)


@pytest.fixture
async def other_stub(contract_environment: dict[str, Any], grpc_loop: LoopThread) -> AsyncIterator[Any]:
    """A second state process over the same database."""
    with grpc_loop.opened(lambda: serving(contract_environment)) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            yield state_pb2_grpc.StateServiceStub(channel)


def colleague(aio_stub: Any, identities: Identities, user: UserExecutionContext, role: str) -> Asker:
    """Somebody else of the tenant, with a role."""
    return Asker(aio_stub, identities, person(user.tenant_id), role=role)


async def test_an_approval_is_asked_for_listed_and_answered(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        schema = b'{"type":"object"}'
        fields = {"arguments": b'{"sum":5}', "answer_schema": schema, "expires_time": moment(100)}
        approval_id = await ask_person(executor, user, **fields)
        run_id = approval_id.partition(".")[0]
        approval = await ann.approval(approval_id)
        assert approval is not None
        assert (approval.title, approval.arguments, approval.answer_schema) == ("May I?", b'{"sum":5}', schema)
        assert (approval.run_id, approval.user_id, approval.agent) == (run_id, user.user_id, "lookup")
        assert (approval.session_id, approval.role, approval.decision) == (user.session_id, "runner", 0)
        assert approval.kind == types_pb2.APPROVAL_KIND_QUESTION
        assert await ann.approvals() == [approval] == await ann.approvals(run_id=run_id)
        assert await ann.answer(approval_id, ALLOW, b'{"note":"fine"}', request_id="yes") == ""
        claimed = await claimer.next_claim()
        assert claimed.run.state == WAITING
        told = claimed.inputs[0].approval
        assert (told.approval_id, told.decision, told.data) == (approval_id, ALLOW, b'{"note":"fine"}')
        assert claimed.inputs[0].requested_by == user.user_id
        await executor.go_on(
            user, run_id, resolved(run_id, 2), cancelled(), after=3, epoch=2, consumed_request_ids=["yes"]
        )
    answered = await ann.approval(approval_id)
    assert answered is not None
    assert (answered.decision, answered.data, answered.answered_by) == (ALLOW, b'{"note":"fine"}', user.user_id)
    assert answered.resolve_time.ToNanoseconds() >= answered.create_time.ToNanoseconds()
    assert (await ann.approvals(), await ann.approvals(include_resolved=True)) == ([], [answered])


async def test_of_many_answers_on_two_processes_one_wins(
    aio_stub: Any,
    other_stub: Any,
    identities: Identities,
    executor: Executor,
    user: UserExecutionContext,
    contract_environment: dict[str, Any],
) -> None:
    approvals = [await ask_person(executor, person(user.tenant_id), role="operator") for _ in range(4)]
    askers = [colleague(stub, identities, user, "operator") for stub in (aio_stub, other_stub) * 4]
    for approval_id in approvals:
        decisions = [ALLOW, DENY] * 4
        answers = await asyncio.gather(
            *(asker.answer(approval_id, decision) for asker, decision in zip(askers, decisions, strict=True))
        )
        assert sorted(answers) == ["", *["APPROVAL_RESOLVED"] * 7]
        winner = answers.index("")
        approval = await askers[0].approval(approval_id)
        assert approval is not None
        assert (approval.decision, approval.answered_by) == (decisions[winner], askers[winner].user.user_id)
        owner = await asyncpg.connect(contract_environment["owner_database_url"])
        stored = await owner.fetchval(
            "SELECT count(*) FROM state.inputs WHERE run_id = $1 AND kind = 'approval'", approval_id.partition(".")[0]
        )
        await owner.close()
        assert stored == 1


async def test_an_answer_sent_twice_gets_its_first_answer_and_another_hears_who_decided(
    executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    approval_id = await ask_person(executor, user)
    assert await ann.answer(approval_id, DENY, request_id="no") == ""
    assert await ann.answer(approval_id, DENY, request_id="no") == ""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        answer = state_pb2.ApprovalInput(approval_id=approval_id, decision=ALLOW)
        await ann.put(approval_id.partition(".")[0], approval=answer)
    error = error_of(raised.value)
    assert (error.reason, dict(error.metadata)["decision"], dict(error.metadata)["by"]) == (
        "APPROVAL_RESOLVED", "DENY", user.user_id,
    )  # fmt: skip


@pytest.mark.parametrize("needed", ROLES)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("is_own", [True, False])
async def test_who_may_see_and_answer(
    aio_stub: Any,
    identities: Identities,
    executor: Executor,
    user: UserExecutionContext,
    needed: str,
    role: str,
    is_own: bool,
) -> None:
    approval_id = await ask_person(executor, user, role=needed)
    asker = Asker(aio_stub, identities, user if is_own else person(user.tenant_id), role=role)
    has_role = ROLES.index(role) >= ROLES.index(needed) and (is_own or needed != "runner")
    is_seen = is_own or has_role
    assert (await asker.approval(approval_id) is not None) == is_seen
    assert [approval.approval_id for approval in await asker.approvals()] == [approval_id] * is_seen
    run_id = approval_id.partition(".")[0]
    assert [approval.approval_id for approval in await asker.approvals(run_id=run_id)] == [approval_id] * is_seen
    expected = "" if has_role else "ROLE_REQUIRED" if is_own else "APPROVAL_NOT_FOUND"
    assert await asker.answer(approval_id) == expected


async def test_another_tenant_sees_and_answers_nothing(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    approval_id = await ask_person(executor, user, role="operator")
    stranger = Asker(aio_stub, identities, person(), role="admin")
    assert await stranger.approval(approval_id) is None
    assert await stranger.approvals(include_resolved=True) == []
    assert await stranger.answer(approval_id) == "APPROVAL_NOT_FOUND"
    assert await stranger.approvals(run_id=approval_id.partition(".")[0]) == []


async def test_what_is_no_approval_is_not_found(executor: Executor, user: UserExecutionContext, ann: Asker) -> None:
    approval_id = await ask_person(executor, user)
    run_id = approval_id.partition(".")[0]
    for wrong in (f"{run_id}.3", f"{run_id}.02", f"{new_id()}.2", f"{run_id}.", run_id, "x", f"{run_id}.9999999999999"):
        assert await ann.approval(wrong) is None
        answer = state_pb2.ApprovalInput(approval_id=wrong, decision=ALLOW)
        assert await ann.try_put(run_id, approval=answer) == "APPROVAL_NOT_FOUND"
    for undecided in (0, EXPIRED, WITHDRAWN):
        assert await ann.answer(approval_id, undecided) == "REQUEST_INVALID"  # type: ignore[arg-type]  # no answer
    assert await ann.answer(approval_id, 99) == "REQUEST_INVALID"  # type: ignore[arg-type]  # no decision
    assert await ann.answer(approval_id, ALLOW, b"x" * ((1 << 20) + 1)) == "REQUEST_INVALID"
    assert await ann.answer(approval_id) == ""


async def test_an_answer_out_of_time_is_refused_and_the_holder_alone_says_that_it_is(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    late = await ask_person(executor, user, expires_time=moment(-5))
    assert await ann.answer(late) == "APPROVAL_EXPIRED"
    holder = identities.service_metadata(user)
    assert await ann.answer(late, EXPIRED, metadata=holder, request_id="late") == ""
    assert await ann.answer(late, EXPIRED, metadata=holder, request_id="late") == ""
    approval = await ann.approval(late)
    assert approval is not None
    assert (approval.decision, approval.answered_by) == (EXPIRED, "")
    assert await ann.answer(late) == "APPROVAL_RESOLVED"
    other = person()
    early = await ask_person(executor, other, expires_time=moment(100))
    never = await ask_person(executor, person(user.tenant_id))
    assert await ann.answer(early, EXPIRED, metadata=identities.service_metadata(other)) == "TRANSITION_ILLEGAL"
    assert await ann.answer(never, EXPIRED, metadata=holder) == "APPROVAL_NOT_FOUND"
    assert await Asker(aio_stub, identities, other).answer(early) == ""


async def test_an_answer_by_a_service_counts_as_that_of_whom_it_acts_for(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    approval_id = await ask_person(executor, user, role="operator")
    assert await ann.answer(approval_id, metadata=identities.service_metadata(user)) == "ROLE_REQUIRED"


async def test_the_end_of_a_run_withdraws_what_is_open_and_refuses_answers(
    executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    approval_id = await ask_person(executor, user)
    run_id = approval_id.partition(".")[0]
    await executor.go_on(user, run_id, resolved(run_id, 2, WITHDRAWN), cancelled(), after=3)
    assert await ann.answer(approval_id) == "RUN_ENDED"
    approval = await ann.approval(approval_id)
    assert approval is not None
    assert approval.decision == WITHDRAWN


async def test_a_withdrawal_does_not_undo_an_answer(executor: Executor, user: UserExecutionContext, ann: Asker) -> None:
    approval_id = await ask_person(executor, user)
    run_id = approval_id.partition(".")[0]
    assert await ann.answer(approval_id, DENY) == ""
    await executor.go_on(user, run_id, resolved(run_id, 2, WITHDRAWN), cancelled(), after=3)
    approval = await ann.approval(approval_id)
    assert approval is not None
    assert (approval.decision, approval.answered_by) == (DENY, user.user_id)


async def test_approvals_that_nobody_could_answer_are_refused(executor: Executor, user: UserExecutionContext) -> None:
    run_id = await executor.start(user)
    good = asking(run_id, 2)
    for change in (
        {"approval_id": f"{run_id}.3"},
        {"approval_id": f"{new_id()}.2"},
        {"role": "god"},
        {"title": "t" * 1_001},
        {"title": "\x00"},
        {"call_id": "c" * 129},
    ):
        bad = asking(run_id, 2)
        for name, value in change.items():
            setattr(bad.approval_requested, name, value)
        result = await executor.send_one(executor.append(user, run_id, bad, after=1))
        assert reason_of(result.status) == "REQUEST_INVALID"
    for over in (resolved(new_id(), 2), resolved(run_id, 2, 0)):  # type: ignore[arg-type]  # a number
        result = await executor.send_one(executor.append(user, run_id, over, after=1))
        assert reason_of(result.status) == "REQUEST_INVALID"
    await executor.go_on(user, run_id, good, after=1)
    # One that was never asked for, and one that is asked and over in the same append.
    await executor.go_on(user, run_id, resolved(run_id, 1), asking(run_id, 4), resolved(run_id, 4), after=2)
    await executor.go_on(user, run_id, completed(), after=5)


async def test_pages_of_approvals_have_each_once(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    run_id = await executor.start(user)
    await executor.go_on(user, run_id, *(asking(run_id, seq) for seq in range(2, 12)), after=1)
    boss = Asker(aio_stub, identities, user, role="admin")
    others = []
    for role in ("operator", "admin"):
        stranger = person(user.tenant_id)
        other = await executor.start(stranger)
        await executor.go_on(
            stranger,
            other,
            *(asking(other, seq, role=role) for seq in range(2, 5)),
            waiting(),
            after=1,
            release=RELEASE,
        )
        others += [f"{other}.{seq}" for seq in range(2, 5)]

    async def pages(asker: Asker, **fields: Any) -> list[str]:
        found, token = [], ""
        while True:
            request = state_pb2.ListApprovalsRequest(page_size=4, page_token=token, **fields)
            page = await aio_stub.ListApprovals(request, metadata=asker.metadata, timeout=TIMEOUT)
            found += [approval.approval_id for approval in page.approvals]
            token = page.next_page_token
            if not token:
                return found

    own = [f"{run_id}.{seq}" for seq in range(11, 1, -1)]
    assert await pages(ann) == await pages(ann, run_id=run_id, include_resolved=True) == own
    seen = await pages(boss, include_resolved=True)
    assert (len(seen), set(seen)) == (16, {*own, *others})
    for token in ("x", "1.x", f"999999999999999999999.{run_id}.2", f"{run_id}.2"):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ann.approvals(page_token=token)
        assert error_of(raised.value).reason == "REQUEST_INVALID"
