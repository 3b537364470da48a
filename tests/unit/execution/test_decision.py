"""The agent loop is a fold: golden cases, and properties over random agents, logs cut anywhere, and takeovers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring.v1 import dispatcher_pb2, events_pb2, types_pb2
from mainspring_execution.core.decision import (
    CallModel,
    CallTools,
    Fail,
    Finish,
    Wait,
    check_result,
    check_takeover,
    decide,
    refuse_call,
)
from mainspring_execution.core.progress import Progress, fold
from mainspring_execution.core.record import make_outcome
from mainspring_execution.core.unknown import Ask

from tests.unit.execution.samples import ENVELOPE, NOW, PURE, RUN_ID, Log, plan

pytestmark = pytest.mark.unit

KEYED, UNSAFE = types_pb2.EFFECT_CLASS_KEYED, types_pb2.EFFECT_CLASS_UNSAFE


def test_a_run_without_events_begins() -> None:
    assert decide(plan(), Progress(), run_id=RUN_ID, now=NOW) is Wait.BEGIN


def test_a_begun_run_asks_its_model_for_the_first_step() -> None:
    assert Log().decision() == CallModel(1)


def test_planned_calls_are_made_under_ids_of_run_and_seq() -> None:
    decision = Log().think(1, calls=2).decision()
    assert isinstance(decision, CallTools)
    assert [call.call_id for call in decision.calls] == [f"{RUN_ID}.2.0", f"{RUN_ID}.2.1"]


def test_only_calls_without_an_outcome_are_made() -> None:
    decision = Log().think(1, calls=2).intend().intend().complete().recover().decision()
    assert isinstance(decision, CallTools)
    assert [call.call_id for call in decision.calls] == [f"{RUN_ID}.2.1"]


def test_a_step_without_calls_or_result_is_followed_by_the_next() -> None:
    assert Log().think(1).decision() == CallModel(2)
    assert Log().think(1, calls=1).intend().complete().decision() == CallModel(2)


def test_a_result_ends_the_run() -> None:
    assert Log().think(1, result=b"1").decision() == Finish(b"1")


def test_an_ended_run_needs_nothing() -> None:
    assert Log().think(1, result=b"1").add(agent_completed=events_pb2.AgentCompleted()).decision() is Wait.ENDED


def test_the_steps_of_an_agent_are_bounded() -> None:
    decision = Log().think(1).think(2).decision(max_steps=2)
    assert isinstance(decision, Fail)
    assert (decision.error.reason, decision.error.metadata["max_steps"]) == ("STEPS_EXHAUSTED", "2")
    assert Log().think(1).think(2, result=b"1").decision(max_steps=2) == Finish(b"1")


@pytest.mark.parametrize("effect", [PURE, types_pb2.EFFECT_CLASS_IDEMPOTENT, KEYED])
def test_a_lost_call_that_may_be_repeated_is_made_again_under_its_id(effect: types_pb2.EffectClass.ValueType) -> None:
    log = Log().think(1, calls=1).intend(effect).recover()
    decision = log.decision()
    assert isinstance(decision, CallTools)
    assert decision.calls[0].call_id == f"{RUN_ID}.2.0"
    assert fold(log.events).attempts == {f"{RUN_ID}.2.0": 2}


def test_a_lost_unsafe_call_is_never_made_again_by_itself() -> None:
    decision = Log().think(1, calls=1).intend(UNSAFE).recover().decision()
    assert isinstance(decision, Ask)
    assert decision.intent.call_id == f"{RUN_ID}.2.0"


def test_an_unsafe_call_that_is_under_way_here_is_not_lost() -> None:
    progress = fold(Log().think(1, calls=1).intend(UNSAFE).events)
    decision = decide(plan(), progress, run_id=RUN_ID, now=NOW, under_way={f"{RUN_ID}.2.0": None})
    assert isinstance(decision, CallTools)


def test_an_unsafe_call_without_an_intent_was_not_made_and_is() -> None:
    assert isinstance(Log().think(1, calls=1).recover().decision(), CallTools)


def test_a_third_takeover_without_a_new_event_poisons_the_run() -> None:
    log = Log().think(1)
    for _ in range(2):
        assert check_takeover(fold(log.events), run_id=RUN_ID) is None
        log.recover()
    error = check_takeover(fold(log.events), run_id=RUN_ID)
    assert error is not None
    assert (error.reason_name, error.metadata["attempts"]) == ("RUN_POISONED", "3")
    assert check_takeover(fold(log.think(2).events), run_id=RUN_ID) is None


def test_a_result_is_checked_against_the_schema() -> None:
    checked = plan(output_schema={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert check_result(checked, b'{"a":1}', steps_max=100) is None
    error = check_result(checked, b'{"a":"x"}', steps_max=100)
    assert error is not None
    assert (error.reason_name, error.metadata["path"]) == ("RESULT_INVALID", "$.a")
    assert check_result(plan(), b'"anything"', steps_max=0) is None


def test_an_agent_cannot_call_what_it_was_not_given() -> None:
    call = events_pb2.PlannedCall(call_id="c", tool="bank.transfer")
    error = refuse_call(plan(), call)
    assert error is not None
    assert (error.reason_name, error.metadata) == ("TOOL_NOT_FOUND", {"tool": "bank.transfer"})


def test_a_log_with_a_gap_is_not_folded() -> None:
    log = Log().think(1)
    with pytest.raises(ValueError, match="cannot follow"):
        fold([log.events[0], ENVELOPE.event(3, agent_thinking=events_pb2.AgentThinking(step=1))])


def test_an_unknown_event_is_skipped_only_where_it_says_so() -> None:
    log = Log()
    log.add(safe_to_skip=True)
    assert log.decision() == CallModel(1)
    with pytest.raises(ValueError, match="does not know"):
        fold([*log.events, ENVELOPE.event(3)])


# ---- properties -----------------------------------------------------------------------------------------------------

STEPS = st.lists(st.integers(0, 3), max_size=5)
EFFECTS = st.sampled_from([PURE, types_pb2.EFFECT_CLASS_IDEMPOTENT, KEYED])


class Machine:
    """Drives a run on paper: executes what is decided, and counts what it executes."""

    def __init__(self, script: list[int], effect: types_pb2.EffectClass.ValueType) -> None:
        self.script = script
        self.effect = effect
        self.model_steps: list[int] = []
        self.calls: list[str] = []

    def drive(self, log: Log, *, events_max: int = 10_000) -> Log:
        """Goes on until the run ends or the log has so many events: there the executor dies."""
        while len(log.events) < events_max:
            decision = log.decision()
            if decision is Wait.ENDED:
                return log
            if isinstance(decision, CallModel):
                self.model_steps.append(decision.step)
                over = decision.step > len(self.script)
                log.think(
                    decision.step, calls=0 if over else self.script[decision.step - 1], result=b"1" if over else b""
                )
            elif isinstance(decision, CallTools):
                self._call(log, decision, events_max)
            elif isinstance(decision, Finish):
                log.add(agent_completed=events_pb2.AgentCompleted(result=decision.result))
            else:
                raise AssertionError(decision)
        return log

    def _call(self, log: Log, decision: CallTools, events_max: int) -> None:
        intents = fold(log.events).intents
        for call in decision.calls:
            if call.call_id not in intents and len(log.events) < events_max:
                log.intend(self.effect)
        intents = fold(log.events).intents
        for call in decision.calls:
            if call.call_id in intents and len(log.events) < events_max:
                self.calls.append(call.call_id)
                result = dispatcher_pb2.ToolResult(status=types_pb2.TOOL_STATUS_OK, result=b"1")
                log.add(tool_completed=make_outcome(intents[call.call_id], result, duration_ms=1.0))


def outline(log: Log) -> list[tuple[str | None, str]]:
    """What a log says, but for who drove it and how often."""
    names = [(event.WhichOneof("payload"), event) for event in log.events]
    return [
        (name, event.tool_completed.call_id.rpartition(".")[2] if name == "tool_completed" else "")
        for name, event in names
        if name != "run_recovered"
    ]


@given(STEPS, EFFECTS)
def test_a_whole_run_executes_each_step_once(script: list[int], effect: types_pb2.EffectClass.ValueType) -> None:
    machine = Machine(script, effect)
    log = machine.drive(Log())
    assert machine.model_steps == list(range(1, len(script) + 2))
    assert len(machine.calls) == len(set(machine.calls)) == sum(script)
    assert [event.seq for event in log.events] == list(range(1, len(log.events) + 1))


@given(STEPS, EFFECTS, st.data())
def test_a_crash_anywhere_repeats_no_finished_step_and_changes_no_outcome(
    script: list[int], effect: types_pb2.EffectClass.ValueType, data: st.DataObject
) -> None:
    whole = Machine(script, effect).drive(Log())
    cut = data.draw(st.integers(1, len(whole.events)))
    first, second = Machine(script, effect), Machine(script, effect)
    durable = first.drive(Log(), events_max=cut)
    finished = fold(durable.events)
    if not finished.ended:
        second.drive(durable.recover())
    assert outline(durable) == outline(whole)
    assert not set(second.model_steps) & set(range(1, finished.steps + 1))
    assert not set(second.calls) & set(finished.outcomes)


@given(STEPS, EFFECTS, st.data())
def test_any_prefix_folds_to_the_same_decision_however_it_is_reached(
    script: list[int], effect: types_pb2.EffectClass.ValueType, data: st.DataObject
) -> None:
    events = Machine(script, effect).drive(Log()).events
    cut = data.draw(st.integers(0, len(events)))
    wire = [events_pb2.RunEvent.FromString(event.SerializeToString()) for event in events[:cut]]
    grown = Progress()
    for event in events[:cut]:
        decide(plan(), grown, run_id=RUN_ID, now=NOW)
        grown.apply(event)
    assert decide(plan(), grown, run_id=RUN_ID, now=NOW) == decide(plan(), fold(wire), run_id=RUN_ID, now=NOW)
    assert grown.seq == cut
