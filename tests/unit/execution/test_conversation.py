"""What a model is told of a run, and what goes first when that is too much."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.conversation import GO_ON, Part, Said, Stepped, Window, compose, measure, speak
from mainspring_execution.core.thought import Turn

from tests.unit.execution.samples import RUN_ID

pytestmark = pytest.mark.unit

LONG = orjson.dumps("word " * 400)


def turn(*results: bytes, history: int = 0, **changes: Any) -> Turn:
    """A turn after as many steps as there are results, each with one call."""
    calls = [
        events_pb2.PlannedCall(call_id=f"{RUN_ID}.{2 + index}.0", tool="a.b", arguments=b'{"n":1}')
        for index in range(len(results))
    ]
    fields: dict[str, Any] = {
        "tenant_id": "acme",
        "user_id": "ann",
        "session_id": "talk-1",
        "run_id": RUN_ID,
        "step": len(results) + 1,
        "attempt": 1,
        "input": b'{"text":"now"}',
        "planned": calls,
        "outcomes": {
            call.call_id: events_pb2.ToolCompleted(call_id=call.call_id, status=types_pb2.TOOL_STATUS_OK, result=result)
            for call, result in zip(calls, results, strict=True)
        },
        "thoughts": [
            events_pb2.AgentThinking(step=index + 1, text=f"step {index + 1}", planned_calls=[call])
            for index, call in enumerate(calls)
        ],
        "history": [
            types_pb2.Run(input=orjson.dumps({"text": f"question {index}"}), result=orjson.dumps(f"answer {index}"))
            for index in range(history)
        ],
    }
    return Turn(**{**fields, **changes})


def texts(parts: list[Part]) -> list[str]:
    return [part.text for part in parts]


def outcomes(parts: list[Part]) -> list[str]:
    return [call.outcome for part in parts if isinstance(part, Stepped) for call in part.calls]


def size(parts: list[Part]) -> int:
    return sum(map(measure, parts))


def test_the_conversation_is_history_input_and_steps_in_their_order() -> None:
    parts = compose(turn(b"7", history=2), Window())
    assert texts(parts) == ["question 0", "answer 0", "question 1", "answer 1", "now", "step 1"]
    assert [part.role for part in parts if isinstance(part, Said)] == ["user", "assistant"] * 2 + ["user"]
    assert outcomes(parts) == ["7"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b'"plain"', "plain"),
        (b'{"text": "in a field"}', "in a field"),
        (b'{"text": 7}', '{"text": 7}'),
        (b'{"text":"a","more":1}', '{"text":"a","more":1}'),
        (b'["text"]', '["text"]'),
        (b"7", "7"),
        (b"null", "null"),
        ('{"text":"ä\\n🎉"}'.encode(), "ä\n🎉"),
    ],
)
def test_a_value_is_said_as_a_person_would(value: bytes, said: str) -> None:
    assert speak(value) == said


def test_a_failed_call_tells_why() -> None:
    asked = turn(b"7")
    [call_id] = asked.outcomes
    error = types_pb2.RunError(code="NOT_FOUND", reason="TOOL_FAILED", message="no such row")
    failed = events_pb2.ToolCompleted(call_id=call_id, status=types_pb2.TOOL_STATUS_DENIED, error=error)
    parts = compose(turn(b"7", outcomes={call_id: failed}), Window())
    assert '"message":"no such row"' in outcomes(parts)[0]
    assert isinstance(parts[-1], Stepped) and parts[-1].calls[0].is_error


def test_wire_ids_are_short_and_differ_within_the_run() -> None:
    parts = compose(turn(b"1", b"2"), Window())
    ids = [call.wire_id for part in parts if isinstance(part, Stepped) for call in part.calls]
    assert ids == ["call_2_0", "call_3_0"]


def test_only_a_models_own_faults_are_told_to_it() -> None:
    error = types_pb2.RunError(reason="RESULT_INVALID", message="Not JSON.", metadata={"answer": "seven"})
    failures = [
        events_pb2.AttemptFailed(error=types_pb2.RunError(reason="MODEL_FAILED", message="busy")),
        events_pb2.AttemptFailed(error=error),
    ]
    parts = compose(turn(failures=failures), Window())
    assert texts(parts)[:2] == ["now", "seven"]
    assert len(parts) == 3 and "Not JSON." in texts(parts)[2]


def test_a_step_without_calls_is_answered_so_that_the_model_does_not_go_on_in_its_own_words() -> None:
    parts = compose(turn(thoughts=[events_pb2.AgentThinking(step=1, text="Hm.")]), Window())
    assert texts(parts) == ["now", "Hm.", GO_ON]


def test_the_oldest_history_goes_first_and_in_pairs() -> None:
    whole = compose(turn(b"7", history=3), Window())
    parts = compose(turn(b"7", history=3), Window(size(whole) - 1))
    assert texts(parts)[:3] == ["question 1", "answer 1", "question 2"]
    assert outcomes(parts) == ["7"]


def test_then_old_results_are_shortened_and_the_newest_stay_whole() -> None:
    window = Window(size(compose(turn(LONG, LONG, LONG), Window())) - 10, keep_last=1)
    found = outcomes(compose(turn(LONG, LONG, LONG, history=1), window))
    assert [len(outcome) == len(LONG) for outcome in found] == [False, True, True]
    assert found[0].endswith("characters left out)")


def test_then_old_steps_go_each_with_its_calls() -> None:
    parts = compose(turn(*[LONG] * 6), Window(1_400, keep_last=2))
    steps = [part for part in parts if isinstance(part, Stepped)]
    assert all(len(step.calls) == 1 for step in steps)
    assert steps[-1].text == "step 6" and 2 <= len(steps) < 6
    assert [len(step.calls[0].outcome) == len(LONG) for step in steps[-2:]] == [True, True]


def test_at_last_the_results_of_the_newest_steps_are_shortened_but_the_input_never() -> None:
    data = orjson.dumps({"text": "x" * 4_000})
    parts = compose(turn(LONG, LONG, input=data), Window(600, keep_last=2))
    assert "x" * 4_000 in texts(parts)
    assert max(len(outcome) for outcome in outcomes(parts)) < 300


def test_what_fits_is_left_as_it_is() -> None:
    whole = compose(turn(LONG, b"7", history=2), Window())
    assert compose(turn(LONG, b"7", history=2), Window(size(whole) + 8, keep_last=1)) == whole


def test_instructions_and_tools_have_their_part_of_the_window() -> None:
    window = Window(size(compose(turn(history=4), Window())) + 50)
    assert len(compose(turn(history=4), window)) == 9
    assert len(compose(turn(history=4), window, instructions="x" * 400)) < 9
    tool = types_pb2.Tool(name="a.b", description="x" * 400)
    assert len(compose(turn(history=4, tools=[tool]), window)) < 9
