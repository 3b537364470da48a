"""What `@tool` makes of a function: name, schema, descriptions, and clear words where it cannot."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

import mainspring
import orjson
import pytest
from mainspring.errors import DeclarationError, ToolError
from mainspring.tool import Declaration, ToolContext, declare, is_tool, to_json, tool
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2
from pydantic import BaseModel, Field, ValidationError

pytestmark = pytest.mark.unit


class Line(BaseModel):
    """A line of a bill."""

    service: str
    cost: float


@tool(effect="pure", timeout=2.5)
async def sum_lines(
    lines: list[Line],
    context: ToolContext,
    currency: Literal["EUR", "USD"] = "EUR",
    limit: Annotated[int, Field(gt=0)] | None = None,
) -> float:
    """Adds up the lines of a bill.

    Lines without a cost count as nothing.

    Args:
        lines: The lines to add up,
            in any order.
        currency (str): What the costs are in.

    Returns:
        The sum.
    """
    return sum(line.cost for line in lines)


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    schema: dict[str, Any] = orjson.loads(declare(function).input_schema)
    return schema


def test_the_function_stays_as_it_is() -> None:
    assert asyncio.iscoroutinefunction(sum_lines)
    assert is_tool(sum_lines)
    assert not is_tool(declare)
    assert mainspring.tool is tool


def test_a_declaration_says_what_the_function_is() -> None:
    declaration = declare(sum_lines)
    assert declaration.name == "sum_lines"
    assert declaration.description == "Adds up the lines of a bill.\n\nLines without a cost count as nothing."
    assert (declaration.effect, declaration.timeout_seconds) == ("pure", 2.5)
    assert (declaration.is_async, declaration.context_parameter) == (True, "context")
    message = declaration.to_message()
    assert message.effect == types_pb2.EFFECT_CLASS_PURE
    assert message.timeout.ToMilliseconds() == 2_500
    assert message.input_schema == declaration.input_schema


def test_the_schema_comes_from_hints_and_docstring() -> None:
    schema = schema_of(sum_lines)
    assert schema["type"] == "object"
    assert schema["required"] == ["lines"]
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"lines", "currency", "limit"}
    assert schema["properties"]["lines"]["description"] == "The lines to add up, in any order."
    assert schema["properties"]["lines"]["items"] == {"$ref": "#/$defs/Line"}
    assert schema["properties"]["currency"]["enum"] == ["EUR", "USD"]
    assert schema["properties"]["currency"]["default"] == "EUR"
    assert schema["properties"]["currency"]["description"] == "What the costs are in."


def test_arguments_become_what_the_hints_say_and_defaults_stay_the_functions() -> None:
    arguments = declare(sum_lines).arguments
    assert arguments.validate_json(b'{"lines": [{"service": "s", "cost": 1}]}') == {
        "lines": [Line(service="s", cost=1.0)]
    }
    with pytest.raises(ValidationError):
        arguments.validate_json(b'{"lines": [], "unheard_of": 1}')


def test_a_docstring_in_the_other_style_is_read_too() -> None:
    @tool
    def find(text: str, limit: int = 3) -> None:
        """Finds things.

        :param text: What to find,
            literally.
        :param int limit: How many.
        :returns: nothing
        """

    schema = schema_of(find)
    assert declare(find).description == "Finds things."
    assert schema["properties"]["text"]["description"] == "What to find, literally."
    assert schema["properties"]["limit"]["description"] == "How many."


def test_without_a_word_a_tool_is_unsafe_and_has_thirty_seconds() -> None:
    @tool
    def act() -> None: ...

    declaration = declare(act)
    assert (declaration.effect, declaration.timeout_seconds, declaration.is_async) == ("unsafe", 30.0, False)
    assert declaration.to_message().effect == types_pb2.EFFECT_CLASS_UNSAFE


def test_any_arguments_may_be_taken() -> None:
    @tool(name="any.thing")
    def take(**arguments: Any) -> None: ...

    assert schema_of(take)["additionalProperties"] is True
    assert declare(take).arguments.validate_json(b'{"a": [1]}') == {"a": [1]}


def test_a_default_that_json_cannot_say_is_left_to_the_function() -> None:
    @tool
    def price(amount: Decimal = Decimal(1)) -> None: ...

    schema = schema_of(price)
    assert "required" not in schema
    assert "default" not in schema["properties"]["amount"]


def test_a_long_description_is_cut_between_characters() -> None:
    def act() -> None: ...

    act.__doc__ = "é" * 5_000
    assert declare(tool(act)).description == "é" * 2_048


def _no_hint(value) -> None: ...  # type: ignore[no-untyped-def]  # that is the fault


def _star(*values: int) -> None: ...


def _positional(value: int, /) -> None: ...


def _unknown_hint(value: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821  # that is the fault


def _no_schema(value: threading.Lock) -> None: ...


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (_no_hint, "value has no type hint"),
        (_star, "cannot be passed by name"),
        (_positional, "cannot be passed by name"),
        (_unknown_hint, "Nowhere"),
        (_no_schema, "no JSON schema"),
    ],
)
def test_a_signature_that_makes_no_schema_is_refused(function: Callable[..., Any], word: str) -> None:
    tool(name=function.__name__.strip("_"))(function)
    with pytest.raises(DeclarationError, match=word) as raised:
        declare(function)
    assert function.__qualname__ in str(raised.value)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"name": "Upper"}, "not a tool's name"),
        ({"name": "a" * 129}, "not a tool's name"),
        ({"effect": "harmless"}, "pure, idempotent, keyed, unsafe"),
        ({"timeout": 0}, "3600 seconds"),
        ({"timeout": 3_601}, "3600 seconds"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, Any], word: str) -> None:
    def act() -> None: ...

    with pytest.raises(DeclarationError, match=word):
        tool(**options)(act)


def test_the_context_is_what_the_call_carries() -> None:
    call = pb.WorkerCall(call_id="c1", attempt=2)
    call.context.tenant_id, call.context.user_id, call.context.session_id = "acme", "ann", "s"
    call.context.run_id, call.context.request_id, call.context.parent_request_id = "r", "q", "p"
    call.context.depth, call.context.trace_id = 3, "t"
    call.context.roles.append("runner")
    call.context.deadline.FromSeconds(1_000)
    context = ToolContext.of(call)
    assert context == ToolContext(
        "acme", "ann", "s", "r", "q", "p", 3, ("runner",), "t", datetime.fromtimestamp(1_000, UTC), "c1", 2
    )
    assert not context.cancelled
    context.cancel_flag.set()
    assert context.cancelled


@dataclass
class Point:
    x: int


def test_results_are_json_of_plain_values_dataclasses_and_models() -> None:
    when = datetime(2026, 1, 2, tzinfo=UTC)
    value = {"point": Point(1), "line": Line(service="s", cost=1), "when": when, "none": None}
    assert orjson.loads(to_json(value)) == {
        "point": {"x": 1},
        "line": {"service": "s", "cost": 1.0},
        "when": "2026-01-02T00:00:00+00:00",
        "none": None,
    }
    with pytest.raises(TypeError, match="not JSON serializable: set"):
        to_json({"a": {1}})


def test_a_tool_error_keeps_its_meaning() -> None:
    error = ToolError("No bill 7.", code="NOT_FOUND", reason="NO_BILL", metadata={"bill": 7})
    assert (error.code, error.reason, error.metadata, str(error)) == (
        "NOT_FOUND",
        "NO_BILL",
        {"bill": "7"},
        "No bill 7.",
    )
    with pytest.raises(ValueError, match="MISSING"):
        ToolError("m", code="MISSING")


def test_a_declaration_is_a_value() -> None:
    assert isinstance(declare(sum_lines), Declaration)
    assert declare(sum_lines).input_schema == declare(sum_lines).input_schema
