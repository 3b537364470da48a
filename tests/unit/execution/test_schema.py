"""Checks of results against schemas, and that none of them takes longer than its steps."""

from __future__ import annotations

from typing import Any

import pytest
from mainspring_execution.core.schema import Schema, TooCostlyError

pytestmark = pytest.mark.unit

STEPS = 2_000
REFERENCES = 22

DOUBLING: dict[str, Any] = {
    "$ref": "#/$defs/a0",
    "$defs": {
        **{f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(REFERENCES)},
        f"a{REFERENCES}": {"type": "object"},
    },
}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        pytest.param(DOUBLING, {}, id="references that double"),
        pytest.param({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, {}, id="a circle"),
        pytest.param({"items": {}}, [0] * 100_000, id="a long array"),
        pytest.param({"uniqueItems": True}, [[n] for n in range(100_000)], id="a long array of different items"),
        pytest.param({"enum": list(range(20_000))}, 1, id="a long list of choices"),
        pytest.param({"unevaluatedProperties": False}, {}, id="a keyword that nothing bounds"),
        pytest.param({"patternProperties": {f"a{n}": {} for n in range(9)}}, {"a": 1}, id="many patterns to compile"),
    ],
)
def test_a_check_ends_when_its_steps_are_used_up(schema: dict[str, Any], value: Any) -> None:
    with pytest.raises(TooCostlyError):
        Schema(schema).first_fault(value, steps_max=STEPS)


def test_a_value_that_nests_too_deep_is_not_checked() -> None:
    value: list[Any] = []
    for _ in range(1_000):
        value = [value]
    with pytest.raises(TooCostlyError):
        Schema({"items": {"$ref": "#"}}).first_fault(value, steps_max=1_000_000)


def test_no_pattern_takes_exponential_time() -> None:
    schema = {"pattern": "^(a+)+$"}
    assert Schema(schema).first_fault("a" * 10_000, steps_max=STEPS) is None
    assert Schema(schema).first_fault("a" * 10_000 + "!", steps_max=STEPS) is not None


def test_a_pattern_that_cannot_be_matched_in_linear_time_is_a_fault() -> None:
    fault = Schema({"pattern": r"(a)\1"}).first_fault("aa", steps_max=STEPS)
    assert fault is not None
    assert "backreferences" in fault.message


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            {"additionalProperties": False, "properties": {"a": {}}, "patternProperties": {"^x": {}}},
            {"a": 1, "xy": 2},
            {"b": 1},
        ),
        ({"additionalProperties": {"type": "integer"}, "properties": {"a": {}}}, {"a": "x", "b": 1}, {"b": "x"}),
        ({"patternProperties": {"^n": {"type": "integer"}}}, {"n": 1, "s": "x"}, {"n": "x"}),
        ({"pattern": "^b$"}, "b", "ab"),
        ({"pattern": "b"}, 5, "a"),
        ({"uniqueItems": True}, [1, True, "1", [1], {"a": 1}], [{"a": [1]}, {"a": [1.0]}]),
        ({"uniqueItems": False}, [1, 1], None),
        ({"items": {"$ref": "#/$defs/n"}, "$defs": {"n": {"type": "integer"}}}, [1, 2], [1, "x"]),
    ],
)
def test_keywords_mean_what_json_schema_says(schema: dict[str, Any], right: Any, wrong: Any) -> None:
    assert Schema(schema).first_fault(right, steps_max=10_000) is None
    if wrong is not None:
        assert Schema(schema).first_fault(wrong, steps_max=10_000) is not None
