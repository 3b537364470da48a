"""The memory of outcomes is bounded in number, bytes and age."""

from __future__ import annotations

import pytest
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring_dispatcher.core import memory
from mainspring_dispatcher.core.parts import TOOL_UNKNOWN, Call

from tests.unit.dispatcher.boards import make_call

pytestmark = pytest.mark.unit


def call(call_id: str) -> Call:
    message = make_call(call_id)
    return Call(message, ("", "echo"), TOOL_UNKNOWN, 1, 0.0, 1.0, 1.0, [], executions=1)


def test_the_oldest_is_forgotten_when_there_are_too_many() -> None:
    kept = memory.Memory()
    for number in range(memory.OUTCOMES_MAX + 1):
        kept.keep(call(f"c{number}"), pb.WorkerResult(), now=0)
    assert kept.recall(make_call("c0")) is None
    assert kept.recall(make_call("c1")) is not None


def test_the_oldest_is_forgotten_when_there_is_too_much() -> None:
    kept = memory.Memory()
    half = pb.WorkerResult(result=b"x" * (memory.BYTES_MAX // 2))
    for number in range(3):
        kept.keep(call(f"c{number}"), half, now=0)
    assert kept.recall(make_call("c0")) is None
    assert kept.recall(make_call("c1")) == (half, 1)


def test_what_is_told_again_counts_once() -> None:
    kept = memory.Memory()
    half = pb.WorkerResult(result=b"x" * (memory.BYTES_MAX // 2))
    for _ in range(3):
        kept.keep(call("c0"), half, now=0)
    kept.keep(call("c1"), half, now=0)
    assert kept.recall(make_call("c0")) is not None


def test_the_old_is_forgotten() -> None:
    kept = memory.Memory()
    kept.keep(call("c0"), pb.WorkerResult(), now=0)
    kept.forget(memory.KEEP_SECONDS - 1)
    assert kept.recall(make_call("c0")) is not None
    kept.forget(memory.KEEP_SECONDS)
    assert kept.recall(make_call("c0")) is None
