"""What a forked run takes over from another one's log: its finished steps, under call ids of its own."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Final

from mainspring.v1 import events_pb2, types_pb2

from mainspring_execution.core.intrinsic import HANDOFF_PREFIX
from mainspring_execution.core.record import make_call_id

_COPIED: Final = frozenset({"agent_thinking", "tool_executing", "tool_completed", "agent_handed_off"})


def finished_steps(
    log: Iterable[events_pb2.RunEvent], *, up_to_seq: int, fail_fast: Container[str]
) -> list[events_pb2.RunEvent]:
    """The events of the steps that had ended by an event, before one with a result: a fork goes on.

    `fail_fast`: tools whose failure ends a run; a step in which one failed is made again.
    """
    steps: list[list[events_pb2.RunEvent]] = []
    for event in log:
        kind = event.WhichOneof("payload")
        if event.seq > up_to_seq:
            break
        if kind == "agent_thinking":
            steps.append([])
        if steps and kind in _COPIED:
            steps[-1].append(event)
    finished = takewhile(lambda step: _is_finished(step, fail_fast), steps)
    return [event for step in finished for event in step]


def planned_ids(events: Iterable[events_pb2.RunEvent]) -> list[str]:
    """The ids of the calls that events plan, in order."""
    return [call.call_id for event in events for call in event.agent_thinking.planned_calls]


# Any: payloads of events by the names of their fields.
def repeat(event: events_pb2.RunEvent, *, run_id: str, seq: int, call_ids: Mapping[str, str]) -> dict[str, Any]:
    """An event of the source as event `seq` of the fork. `call_ids`: of the calls planned so far, by the source's."""
    copy = events_pb2.RunEvent()
    copy.CopyFrom(event)
    kind = event.WhichOneof("payload") or ""
    if kind == "agent_thinking":
        for index, call in enumerate(copy.agent_thinking.planned_calls):
            call.call_id = make_call_id(run_id, seq, index=index)
    elif kind == "tool_executing":
        copy.tool_executing.call_id = call_ids[event.tool_executing.call_id]
        # That run is the source's.
        copy.tool_executing.sub_run_id = ""
    elif kind == "tool_completed":
        copy.tool_completed.call_id = call_ids[event.tool_completed.call_id]
    return {kind: getattr(copy, kind), "source_seq": event.seq}


def _is_finished(step: Sequence[events_pb2.RunEvent], fail_fast: Container[str]) -> bool:
    thinking = step[0].agent_thinking
    outcomes = {event.tool_completed.call_id: event.tool_completed for event in step}
    if thinking.result or any(call.call_id not in outcomes for call in thinking.planned_calls):
        return False
    succeeded = [outcome.tool for outcome in outcomes.values() if outcome.status == types_pb2.TOOL_STATUS_OK]
    if any(call.tool in fail_fast and call.tool not in succeeded for call in thinking.planned_calls):
        return False
    handed_over = any(tool.startswith(HANDOFF_PREFIX) for tool in succeeded)
    return not handed_over or any(event.HasField("agent_handed_off") for event in step)
