"""What a fork takes from its source's log, and which runs are started again."""

from __future__ import annotations

from typing import Any

import pytest
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.forks import finished_steps, planned_ids, repeat
from mainspring_execution.core.progress import fold
from mainspring_execution.core.repeats import again, fork_of, retry_of
from mainspring_execution.core.start import NO_ORIGIN, Origin, hash_request
from mainspring_kit.errors import MainspringError

from tests.unit.execution.samples import PURE, RUN_ID, Log

pytestmark = pytest.mark.unit

FORK_ID = "01890a5d-ac96-774b-bcce-b302099a8058"
ERROR = types_pb2.TOOL_STATUS_ERROR


def called(log: Log, tool: str, *, status: types_pb2.ToolStatus.ValueType = types_pb2.TOOL_STATUS_OK) -> Log:
    """The first call of the last step, begun and ended."""
    (call_id,) = planned_ids(log.events[-1:])
    log.add(tool_executing=events_pb2.ToolExecuting(call_id=call_id, tool=tool, effect=PURE, sub_run_id="s"))
    return log.add(tool_completed=events_pb2.ToolCompleted(call_id=call_id, tool=tool, status=status))


def taken(log: Log, up_to_seq: int = 1_000, fail_fast: frozenset[str] = frozenset()) -> list[int]:
    return [event.seq for event in finished_steps(log.events, up_to_seq=up_to_seq, fail_fast=fail_fast)]


def two_steps() -> Log:
    """Events 2 to 4 and 6 to 8 are steps with a call each, 9 is one without; 10 has the result."""
    log = called(Log().think(1, calls=1), "diagnostics.echo")
    log.add(agent_waiting=events_pb2.AgentWaiting())
    return called(log.think(2, calls=1), "diagnostics.echo").think(3).think(4, result=b"1")


@pytest.mark.parametrize(
    ("up_to_seq", "seqs"),
    [
        (1, []),
        (2, []),
        (3, []),
        (4, [2, 3, 4]),
        (7, [2, 3, 4]),
        (8, [2, 3, 4, 6, 7, 8]),
        (9, [2, 3, 4, 6, 7, 8, 9]),
        (10, [2, 3, 4, 6, 7, 8, 9]),
    ],
)
def test_steps_that_had_ended_by_then_are_taken_over(up_to_seq: int, seqs: list[int]) -> None:
    assert taken(two_steps(), up_to_seq) == seqs


def test_a_step_that_ended_its_run_by_a_failure_is_made_again() -> None:
    log = called(Log().think(1, wants=[("agent.helper", {})]), "agent.helper", status=ERROR)
    assert taken(log) == [2, 3, 4]
    assert taken(log, fail_fast=frozenset({"agent.helper"})) == []


def test_a_handoff_is_taken_over_whole_or_not_at_all() -> None:
    log = called(Log().think(1, wants=[("handoff.expert", {})]), "handoff.expert")
    log.add(agent_handed_off=events_pb2.AgentHandedOff(to_agent="expert"))
    assert taken(log) == [2, 3, 4, 5]
    assert taken(log, 4) == []
    refused = called(Log().think(1, wants=[("handoff.expert", {})]), "handoff.expert", status=ERROR)
    assert taken(refused) == [2, 3, 4]


def copied(source: Log) -> list[events_pb2.RunEvent]:
    """The fork's log as far as it is the source's."""
    events = [events_pb2.RunEvent(run_id=FORK_ID, seq=1, agent_started=events_pb2.AgentStarted(source_seq=10))]
    steps = finished_steps(source.events, up_to_seq=10, fail_fast=())
    for event in steps:
        call_ids = dict(zip(planned_ids(steps), planned_ids(events), strict=False))
        seq = len(events) + 1
        payload: dict[str, Any] = repeat(event, run_id=FORK_ID, seq=seq, call_ids=call_ids)
        events.append(events_pb2.RunEvent(run_id=FORK_ID, seq=seq, **payload))
    return events


def test_copies_have_call_ids_of_the_fork_and_cost_nothing() -> None:
    events = copied(two_steps())
    assert planned_ids(events) == [f"{FORK_ID}.2.0", f"{FORK_ID}.5.0"]
    assert [event.source_seq for event in events] == [0, 2, 3, 4, 6, 7, 8, 9]
    assert events[2].tool_executing.sub_run_id == ""
    progress = fold(events)
    assert progress.open_calls() == [] == progress.begun_calls()
    assert (progress.steps, progress.input_tokens, progress.model_calls, progress.tool_calls) == (3, 0, 0, 0)
    assert (progress.source_seq, progress.copied_seq) == (10, 9)


def test_a_fork_that_has_gone_on_takes_nothing_more_over() -> None:
    events = copied(two_steps())
    thinking = events_pb2.AgentThinking(step=4)
    own = events_pb2.RunEvent(run_id=FORK_ID, seq=len(events) + 1, agent_thinking=thinking)
    assert fold([*events, own]).source_seq == 0


def source(state: str = "FAILED", **fields: Any) -> types_pb2.Run:
    return types_pb2.Run(
        run_id=RUN_ID, agent="lookup", agent_version="3", state=types_pb2.RunState.Value(f"RUN_STATE_{state}"), **fields
    )


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "TIMED_OUT"])
def test_what_ended_badly_may_be_tried_again(state: str) -> None:
    assert retry_of(source(state, attempt=2)) == Origin(RUN_ID, attempt=3)


@pytest.mark.parametrize(
    "run",
    [source("QUEUED"), source("RUNNING"), source("PAUSED"), source("COMPLETED"), source(parent_run_id=FORK_ID)],
    ids=lambda run: types_pb2.RunState.Name(run.state),
)
def test_nothing_else_may(run: types_pb2.Run) -> None:
    with pytest.raises(MainspringError) as raised:
        retry_of(run)
    assert raised.value.reason_name == "TRANSITION_ILLEGAL"


def test_a_fork_begins_at_an_event_that_there_is() -> None:
    assert fork_of(source(last_seq=7), seq=7) == Origin(RUN_ID, 7)
    with pytest.raises(MainspringError) as raised:
        fork_of(source(last_seq=7), seq=8)
    assert raised.value.reason_name == "REQUEST_INVALID"


def test_a_repeated_request_is_known_by_a_key_however_long_its_id_is() -> None:
    assert again(source(), key="retry/1").idempotency_key == "retry/1"
    assert len(again(source(), key="retry/" + "1" * 128).idempotency_key) == 64


def test_the_same_request_for_another_event_is_another_request() -> None:
    start = again(source(), key="fork/1")
    hashes = {
        hash_request(start, "talk", origin=origin) for origin in (NO_ORIGIN, Origin(RUN_ID, 2), Origin(RUN_ID, 3))
    }
    assert len(hashes) == 3
