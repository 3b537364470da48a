"""The scripted model answers from its script, deterministically, and says clearly what it cannot answer."""

from __future__ import annotations

from typing import Any

import grpc
import orjson
import pytest
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.thought import Thought, Turn
from mainspring_execution.models import make_model
from mainspring_execution.models.scripted import ScriptedModel
from mainspring_kit.errors import MainspringError

from tests.unit.execution.samples import RUN_ID, SHOP, plan

pytestmark = pytest.mark.unit


def model(*script: dict[str, Any], instructions: str = "") -> ScriptedModel:
    return ScriptedModel(plan(model={"provider": "scripted", "script": list(script)}, instructions=instructions))


def turn(
    step: int = 1,
    *,
    attempt: int = 1,
    data: bytes = b'{"value":7}',
    outcomes: tuple[events_pb2.ToolCompleted, ...] = (),
    history: tuple[types_pb2.Run, ...] = (),
) -> Turn:
    planned = [
        events_pb2.PlannedCall(call_id=outcome.call_id, tool=outcome.tool, arguments=b'{"n":1}') for outcome in outcomes
    ]
    return Turn(
        tenant_id="acme",
        user_id="ann",
        session_id="talk-1",
        run_id=RUN_ID,
        step=step,
        attempt=attempt,
        input=data,
        planned=planned,
        outcomes={outcome.call_id: outcome for outcome in outcomes},
        history=history,
    )


def unheard(_: str) -> None:
    """Nobody listens to the text as it comes."""


def ok(result: bytes) -> events_pb2.ToolCompleted:
    return events_pb2.ToolCompleted(call_id="c1", tool="look.up", status=types_pb2.TOOL_STATUS_OK, result=result)


def failed() -> events_pb2.ToolCompleted:
    error = types_pb2.RunError(code="INVALID_ARGUMENT", reason="TOOL_FAILED", message="line 17 is no number")
    return events_pb2.ToolCompleted(call_id="c1", tool="look.up", status=types_pb2.TOOL_STATUS_ERROR, error=error)


async def refusal(answering: ScriptedModel, asked: Turn) -> MainspringError:
    with pytest.raises(MainspringError) as raised:
        await answering.think(asked, unheard)
    return raised.value


async def test_a_step_with_calls_plans_them_with_filled_arguments() -> None:
    thought = await model(
        {
            "text": "Look at {{input.value}}.",
            "calls": [{"tool": "a", "arguments": {"v": "{{input.value}}"}}, {"tool": "b"}],
        }
    ).think(turn(), unheard)
    assert thought.text == "Look at 7."
    assert [(call.tool, orjson.loads(call.arguments)) for call in thought.calls] == [("a", {"v": 7}), ("b", {})]
    assert (thought.result, thought.model) == (b"", "scripted/script")


async def test_a_result_passes_json_through_unparsed() -> None:
    answering = model({"result": {"all": "{{calls[0].result}}", "whole": "{{input}}"}})
    thought = await answering.think(
        turn(data=b'{"v": 1.50}', outcomes=(ok(b'{"big":12345678901234567890123}'),)), unheard
    )
    assert thought.result == b'{"all":{"big":12345678901234567890123},"whole":{"v": 1.50}}'


async def test_identities_and_the_state_of_calls_can_be_named() -> None:
    answering = model(
        {"result": ["{{user_id}}", "{{run_id}}", "{{session.id}}", "{{calls[0].status}}", "{{calls[0].error.message}}"]}
    )
    thought = await answering.think(turn(outcomes=(failed(),)), unheard)
    assert orjson.loads(thought.result) == ["ann", RUN_ID, "talk-1", "error", "line 17 is no number"]


async def test_the_history_is_a_list_of_earlier_runs() -> None:
    earlier = types_pb2.Run(run_id="r1", ordinal=1, agent="lookup", input=b'{"value":1}', result=b'{"answer":1}')
    answering = model({"result": ["{{history[0].result.answer}}", "{{session.history}}"]})
    assert answering.needs_history
    first, whole = orjson.loads((await answering.think(turn(history=(earlier,)), unheard)).result)
    assert first == 1
    assert whole == [{"run_id": "r1", "ordinal": 1, "agent": "lookup", "input": {"value": 1}, "result": {"answer": 1}}]
    assert not model({"result": "{{session.id}}"}).needs_history


@pytest.mark.parametrize("template", ["{{input.a}}" * 40, ["{{input.a}}"] * 40, ["{{input}}"] * 40])
async def test_what_a_step_fills_in_is_bounded_together(template: object) -> None:
    data = orjson.dumps({"a": "x" * (1 << 20)})
    error = await refusal(model({"calls": [{"tool": "t", "arguments": {"v": template}}]}), turn(data=data))
    assert (error.reason_name, error.metadata["limit"]) == ("PAYLOAD_TOO_LARGE", str(16 << 20))
    error = await refusal(model({"calls": [{"tool": "t", "arguments": {"v": "{{input.a}}"}}] * 20}), turn(data=data))
    assert error.reason_name == "PAYLOAD_TOO_LARGE"


async def test_an_input_is_parsed_once_however_often_it_is_named() -> None:
    """Twenty thousand times would hold up every other run for a minute."""
    data = orjson.dumps({"b": "y", "a": [1] * 400_000})
    thought = await model({"text": "{{input.b}}" * 5_000}).think(turn(data=data), unheard)
    assert thought.text == "y" * 5_000


async def test_a_value_that_nests_too_deep_to_be_written_is_a_template_error() -> None:
    data = b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"
    error = await refusal(model({"result": {"a": "{{input.a}}"}}), turn(data=data))
    assert error.reason_name == "TEMPLATE_INVALID"


async def test_a_missing_value_is_a_template_error() -> None:
    error = await refusal(model({"result": "{{input.gone}}"}), turn())
    assert (error.reason_name, error.metadata) == ("TEMPLATE_INVALID", {"expression": "input.gone"})
    error = await refusal(model({"result": "{{calls[1].result}}"}), turn(outcomes=(ok(b"1"),)))
    assert error.metadata == {"expression": "calls[1].result"}
    error = await refusal(model({"result": "{{secrets.key}}"}), turn())
    assert error.metadata == {"expression": "secrets.key"}


async def test_the_result_of_a_failed_call_fails_as_the_call_did() -> None:
    error = await refusal(model({"result": "{{calls[0].result.value}}"}), turn(outcomes=(failed(),)))
    assert (error.reason_name, error.code, error.message) == (
        "TOOL_FAILED",
        grpc.StatusCode.INVALID_ARGUMENT,
        "line 17 is no number",
    )
    assert error.metadata["call_id"] == "c1"


async def test_arguments_that_are_one_template_must_be_an_object() -> None:
    answering = model({"calls": [{"tool": "a", "arguments": "{{input.value}}"}]})
    assert (await answering.think(turn(data=b'{"value":{"x":1}}'), unheard)).calls[0].arguments == b'{"x":1}'
    assert (await refusal(answering, turn())).reason_name == "TEMPLATE_INVALID"


async def test_a_script_that_runs_out_says_so() -> None:
    error = await refusal(model({"text": "Hm."}), turn(2))
    assert (error.reason_name, error.metadata) == ("MODEL_FAILED", {"provider": "scripted", "step": "2"})
    assert "result" in error.message


async def test_failures_are_counted_by_attempt_and_so_the_same_after_a_recovery() -> None:
    answering = model({"text": "x", "fail": {"code": "UNAVAILABLE", "message": "no {{input.value}}", "times": 2}})
    for _ in range(2):
        for attempt in (1, 2):
            error = await refusal(answering, turn(attempt=attempt))
            assert (error.code, error.message) == (grpc.StatusCode.UNAVAILABLE, "no 7")
        assert isinstance(await answering.think(turn(attempt=3), unheard), Thought)


async def test_a_failure_without_times_is_for_ever() -> None:
    error = await refusal(model({"fail": {"code": "INTERNAL"}}), turn(attempt=1_000))
    assert (error.reason_name, error.code) == ("MODEL_FAILED", grpc.StatusCode.INTERNAL)


async def test_usage_counts_words() -> None:
    answering = model({"text": "three short words", "result": {"a": "b c"}}, instructions="be very brief")
    usage = (await answering.think(turn(data=b'{"q": "two words"}'), unheard)).usage
    assert (usage.input_tokens, usage.output_tokens) == (3 + 3, 3 + 2)


def test_only_a_delayed_step_waits() -> None:
    answering = model({"text": "a"}, {"text": "b", "delay": "100ms"})
    assert [answering.waits(step) for step in (1, 2, 3)] == [False, True, False]


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"txt": "a"}, "model.script[0].txt"),
        ({"calls": [{"arguments": {}}]}, "model.script[0].calls[0]"),
        ({"calls": [{"tool": "a", "arguments": [1]}]}, "model.script[0].calls[0].arguments"),
        ({"delay": "soon"}, "model.script[0].delay"),
        ({"fail": {"code": "BROKEN"}}, "model.script[0].fail.code"),
        ({"fail": {"code": "INTERNAL", "times": "x"}}, "model.script[0].fail.times"),
    ],
)
def test_a_script_that_cannot_be_run_is_refused_with_its_field(entry: dict[str, Any], field: str) -> None:
    with pytest.raises(MainspringError) as raised:
        model(entry)
    assert (raised.value.reason_name, raised.value.metadata["field"]) == ("SPEC_INVALID", field)


def test_a_provider_that_is_not_there_is_refused() -> None:
    with pytest.raises(MainspringError) as raised:
        make_model(plan(model={"provider": "mystery", "name": "x"}), SHOP)
    assert raised.value.metadata["field"] == "model.provider"


async def test_the_text_is_given_out_in_as_many_pieces_as_the_entry_says() -> None:
    pieces: list[str] = []
    thought = await model({"text": "{{input.value}} times", "deltas": 4}).think(turn(), pieces.append)
    assert (thought.text, pieces) == ("7 times", ["7", " t", "im", "es"])


async def test_a_text_has_no_more_pieces_than_characters() -> None:
    pieces: list[str] = []
    await model({"text": "ab", "deltas": 20}).think(turn(), pieces.append)
    assert pieces == ["a", "b"]
