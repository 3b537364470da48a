"""The board under any sequence of events: each call is answered once, an unsafe one runs once, no line is forgotten."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_dispatcher.core.parts import Worker

from tests.unit.dispatcher.boards import PURE, UNSAFE, FakeLink, Play

pytestmark = pytest.mark.unit

TENANTS = ("acme", "globex")
TOOLS = {"echo": PURE, "pay": UNSAFE}
numbers = st.integers(0, 3)


class BoardMachine(RuleBasedStateMachine):
    """Four workers, two tools, two tenants; time passes in any steps."""

    def __init__(self) -> None:
        super().__init__()
        self.play = Play(waiting_max=5, workers_max=1_000)
        self.asked = 0
        self.attached: dict[tuple[str, int], tuple[Worker, FakeLink]] = {}
        self.links: list[tuple[str, FakeLink]] = []
        self.told: list[pb.CancelOutcome] = []
        self.cancels = 0

    @rule(tenant=st.sampled_from(TENANTS), tool=st.sampled_from(list(TOOLS)), seconds=st.sampled_from([0.5, 4, 20]))
    def call(self, tenant: str, tool: str, seconds: float) -> None:
        self.asked += 1
        self.play.call(f"c{self.asked}", tool, tenant=tenant, effect=TOOLS[tool], seconds=seconds, item_id=self.asked)

    @rule(
        tenant=st.sampled_from(["", *TENANTS]), number=numbers, concurrency=st.integers(1, 3), forgetful=st.booleans()
    )
    def attach(self, tenant: str, number: int, concurrency: int, forgetful: bool) -> None:
        link = FakeLink()
        declared = [types_pb2.Tool(name=name, effect=effect) for name, effect in TOOLS.items()]
        for tool in declared:
            self.play.board.learn(tenant, tool, now=self.play.now)
        seen = [call.dispatch_id for owner, former in self.links if owner == tenant for call in former.calls]
        hello = pb.AttachHello(
            worker_id=f"w{number}",
            tools=declared,
            concurrency=concurrency,
            known_dispatch_ids=[] if forgetful else seen,
        )
        self.links.append((tenant, link))
        worker = self.play.board.attach(tenant, hello, link=link, now=self.play.now)
        self.attached[tenant, number] = (worker, link)

    @rule(data=st.data(), returns=st.booleans())
    def detach(self, data: st.DataObject, returns: bool) -> None:
        if self.attached:
            key = data.draw(st.sampled_from(sorted(self.attached)))
            worker, link = self.attached.pop(key)
            self.play.board.detach(worker, link, now=self.play.now, returns=returns)

    @rule(data=st.data(), status=st.sampled_from([1, 2, 4, 5]))
    def finish(self, data: st.DataObject, status: types_pb2.ToolStatus.ValueType) -> None:
        busy = sorted(key for key, (worker, _) in self.attached.items() if worker.calls)
        if busy:
            worker, _ = self.attached[data.draw(st.sampled_from(busy))]
            dispatch_id = data.draw(st.sampled_from(sorted(worker.calls)))
            result = pb.WorkerResult(dispatch_id=dispatch_id, status=status, result=b"1" if status == 1 else b"")
            self.play.board.finish(worker, result, now=self.play.now)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.asked:
            self.cancels += 1
            number = data.draw(st.integers(1, self.asked))
            for tenant in TENANTS:
                self.play.board.cancel(tenant, f"c{number}", told=self.told.append, now=self.play.now)

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        if self.attached:
            worker, _ = self.attached[data.draw(st.sampled_from(sorted(self.attached)))]
            self.play.board.drain(worker, now=self.play.now)

    @rule(seconds=st.sampled_from([0.1, 1, 5]), beats=st.booleans())
    def pass_time(self, seconds: float, beats: bool) -> None:
        self.play.pass_time(seconds, *(worker for worker, _ in self.attached.values() if beats))

    @invariant()
    def nobody_is_answered_twice(self) -> None:
        counts = Counter(answer.item_id for answer in self.play.caller.answers)
        assert not counts or max(counts.values()) == 1

    @invariant()
    def an_unsafe_call_runs_once(self) -> None:
        runs = Counter(call.call_id for _, link in self.links for call in link.calls if call.tool == "pay")
        assert not runs or max(runs.values()) == 1

    @invariant()
    def a_worker_sees_only_its_tenant(self) -> None:
        assert all(call.context.tenant_id == tenant for tenant, link in self.links if tenant for call in link.calls)

    @invariant()
    def no_worker_has_more_than_it_takes(self) -> None:
        for worker, _ in self.attached.values():
            assert len(worker.calls) <= max(3, worker.concurrency)

    @invariant()
    def nobody_waits_beside_a_free_worker(self) -> None:
        board = self.play.board
        for call, _ in board.lines.standing():
            free = [w for w, link in self.attached.values() if w.link is link and w.takes_calls and call.key in w.keys]
            assert not free

    @invariant()
    def what_is_under_way_is_what_is_not_answered(self) -> None:
        assert self.play.board.under_way == self.asked - len(self.play.caller.answers)
        assert self.play.board.lines.count == len(list(self.play.board.lines.standing()))

    def teardown(self) -> None:
        """In the end everybody has been answered."""
        for worker, link in self.attached.values():
            self.play.board.detach(worker, link, now=self.play.now, returns=False)
        self.play.pass_time(35)
        assert len(self.play.caller.answers) == self.asked
        assert len(self.told) == self.cancels * len(TENANTS)
        assert self.play.board.lines.count == 0


TestBoard = BoardMachine.TestCase
TestBoard.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
