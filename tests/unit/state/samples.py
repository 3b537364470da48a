"""Appends as executors send them, for the tests of state's core."""

from __future__ import annotations

from typing import Any

from mainspring.v1 import events_pb2, state_pb2
from mainspring_state.core.append import Entry, check

RUN = "0199aaaa-bbbb-7ccc-8ddd-eeeeeeeeeeee"
APPEND = "0199aaaa-bbbb-7ccc-8ddd-ffffffffffff"


def run_id(number: int) -> str:
    """One of many run ids."""
    return f"0199aaaa-bbbb-7ccc-8ddd-{number:012x}"


def event(seq: int, run: str = RUN, **payload: Any) -> events_pb2.RunEvent:
    """An event of a run. Any: one of the payload messages, by its field's name."""
    return events_pb2.RunEvent(run_id=run, seq=seq, **payload)


def started(seq: int = 1, run: str = RUN) -> events_pb2.RunEvent:
    """The first event of a log."""
    return event(seq, run, agent_started=events_pb2.AgentStarted(agent_version="1", attempt=1))


def thinking(seq: int, run: str = RUN) -> events_pb2.RunEvent:
    """A model step."""
    return event(seq, run, agent_thinking=events_pb2.AgentThinking(step=1, text="Hm."))


def completed(seq: int, run: str = RUN) -> events_pb2.RunEvent:
    """A good end."""
    return event(seq, run, agent_completed=events_pb2.AgentCompleted(result=b'{"answer":1}'))


def append(*events: events_pb2.RunEvent, run: str = RUN, epoch: int = 1, **fields: Any) -> state_pb2.Append:
    """An append of these events behind those before them. Any: further fields of the message."""
    return state_pb2.Append(
        append_id=APPEND,
        tenant_id="acme",
        run_id=run,
        expected_seq=events[0].seq - 1 if events else 0,
        epoch=epoch,
        events=events,
        **fields,
    )


def create(run: str = RUN, *, session_id: str = "talk", key: str = "", user_id: str = "ann") -> state_pb2.Append:
    """The append that makes a run."""
    made = state_pb2.CreateRun(
        user_id=user_id, session_id=session_id, agent="lookup", agent_version="1", input=b"{}",
        executor_id="executor-1", idempotency_key=key,
    )  # fmt: skip
    return append(started(run=run), run=run, create=made)


def entry(number: int, *, session_id: str = "", key: str = "", seq: int = 0, epoch: int = 1) -> Entry:
    """A checked append: a create, or (with `seq`) one that continues a log."""
    run = run_id(number)
    if seq:
        return check(append(thinking(seq, run), run=run, epoch=epoch))
    return check(create(run, session_id=session_id or f"session-{number}", key=key))
