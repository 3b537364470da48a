"""A board with callers and workers that remember what they were told, and a clock that the test turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_dispatcher.core.board import Board
from mainspring_dispatcher.core.parts import Worker

PURE = types_pb2.EFFECT_CLASS_PURE
KEYED = types_pb2.EFFECT_CLASS_KEYED
UNSAFE = types_pb2.EFFECT_CLASS_UNSAFE
OK = types_pb2.TOOL_STATUS_OK
FIRST_ID = 1_000


@dataclass
class FakeCaller:
    """Keeps the outcomes it was sent."""

    answers: list[pb.ToolResult] = field(default_factory=list)
    gone: bool = False

    def answer(self, result: pb.ToolResult) -> None:
        self.answers.append(result)

    @property
    def only(self) -> pb.ToolResult:
        (answer,) = self.answers
        return answer

    @property
    def reasons(self) -> list[str]:
        return [answer.error.reason or types_pb2.ToolStatus.Name(answer.status) for answer in self.answers]


@dataclass
class FakeLink:
    """Keeps what a worker was sent."""

    calls: list[pb.WorkerCall] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def call(self, call: pb.WorkerCall) -> None:
        self.calls.append(call)

    def cancel(self, dispatch_id: int) -> None:
        self.cancelled.append(dispatch_id)

    def close(self, fault: str) -> None:
        self.faults.append(fault)

    @property
    def call_ids(self) -> list[str]:
        return [call.call_id for call in self.calls]


class Play:
    """The board under test, with its clock."""

    def __init__(self, *, waiting_max: int = 100, workers_max: int = 10) -> None:
        self.board = Board(first_dispatch_id=FIRST_ID, waiting_max=waiting_max, workers_max=workers_max)
        self.board.catalogue_complete = True
        self.now = 100.0
        self.caller = FakeCaller()

    def know(self, tool: str, *, tenant: str = "", effect: types_pb2.EffectClass.ValueType = PURE) -> None:
        self.board.learn(tenant, types_pb2.Tool(name=tool, effect=effect), now=self.now)

    def attach(
        self,
        worker_id: str,
        *tools: str,
        tenant: str = "",
        concurrency: int = 10,
        effect: types_pb2.EffectClass.ValueType = PURE,
        knows: Sequence[pb.WorkerCall] = (),
    ) -> tuple[Worker, FakeLink]:
        link = FakeLink()
        declared = [types_pb2.Tool(name=name, effect=effect) for name in tools]
        for tool in declared:
            self.board.learn(tenant, tool, now=self.now)
        hello = pb.AttachHello(
            worker_id=worker_id,
            tools=declared,
            concurrency=concurrency,
            known_dispatch_ids=[call.dispatch_id for call in knows],
        )
        return self.board.attach(tenant, hello, link=link, now=self.now), link

    def call(
        self,
        call_id: str,
        tool: str = "echo",
        *,
        tenant: str = "acme",
        effect: types_pb2.EffectClass.ValueType = PURE,
        seconds: float = 0,
        attempt: int = 1,
        item_id: int = 1,
        caller: FakeCaller | None = None,
    ) -> None:
        self.board.submit(
            make_call(call_id, tool, tenant=tenant, effect=effect, seconds=seconds, attempt=attempt, item_id=item_id),
            caller or self.caller,
            now=self.now,
        )

    def pass_time(self, seconds: float, *beating: Worker) -> None:
        """Turns the clock in steps of a tenth; the workers named go on beating."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            for worker in beating:
                worker.seen = self.now
            self.board.tick(self.now)

    def finish(self, worker: Worker, call: pb.WorkerCall, result: bytes = b"1") -> None:
        done = pb.WorkerResult(dispatch_id=call.dispatch_id, status=OK, result=result, duration_ms=2.0)
        self.board.finish(worker, done, now=self.now)

    def cancel(self, call_id: str, tenant: str = "acme") -> list[pb.CancelOutcome]:
        told: list[pb.CancelOutcome] = []
        self.board.cancel(tenant, call_id, told=told.append, now=self.now)
        return told


def make_call(
    call_id: str,
    tool: str = "echo",
    *,
    tenant: str = "acme",
    effect: types_pb2.EffectClass.ValueType = PURE,
    seconds: float = 0,
    attempt: int = 1,
    item_id: int = 1,
) -> pb.ToolCall:
    """A call that keeps the contract."""
    call = pb.ToolCall(item_id=item_id, call_id=call_id, tool=tool, arguments=b"{}", effect=effect, attempt=attempt)
    call.context.tenant_id = tenant
    call.context.user_id, call.context.session_id, call.context.run_id = "ann", "session", "run"
    if seconds:
        call.timeout.FromNanoseconds(int(seconds * 1e9))
    return call
