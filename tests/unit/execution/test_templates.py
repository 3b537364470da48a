"""Templates hold names, fields and indexes and nothing else; what is missing is named."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring_execution.models.templates import Expression, compile_template, parse_expression, walk
from mainspring_kit.errors import MainspringError

pytestmark = pytest.mark.unit

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text().filter(lambda text: "{{" not in text),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


class Names:
    """A scope of plain values."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def look_up(self, expression: Expression) -> Any:
        return walk(expression, self._values, path=(expression.root, *expression.path))


def rendered(template: object, **values: Any) -> Any:
    return orjson.loads(compile_template(template).render_json(Names(**values)))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{input.value}}", 7),
        ("{{ input.value }}", 7),
        ("is {{input.value}}!", "is 7!"),
        ("{{input.value}}{{input.value}}", "77"),
        ("{{input.list[1]}}", "b"),
        ("{{input.list[-1]}}", "b"),
        ("{{input.list}}", ["a", "b"]),
        ("list {{input.list}}", 'list ["a","b"]'),
        ({"deep": ["{{input.deep.er[0].x-y}}"]}, {"deep": [None]}),
        ("no hole", "no hole"),
        ("{ {input} }", "{ {input} }"),
        ("{{input.value", "{{input.value"),
        (12.5, 12.5),
    ],
)
def test_a_template_keeps_types_when_whole_and_interpolates_inside(template: object, expected: object) -> None:
    values = {"value": 7, "list": ["a", "b"], "deep": {"er": [{"x-y": None}]}}
    assert rendered(template, input=values) == expected


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1",
        "a b",
        "a.",
        "a[",
        "a[x]",
        "a['x']",
        "a()",
        "a + b",
        "a|b",
        ".a",
        "a..b",
        "a[0",
        "__import__('os')",
        "a[1:2]",
    ],
)
def test_anything_else_is_refused_when_compiled(expression: str) -> None:
    with pytest.raises(MainspringError) as raised:
        compile_template(f"{{{{{expression}}}}}")
    assert raised.value.reason_name == "TEMPLATE_INVALID"
    assert raised.value.metadata["expression"] == expression.strip()


@pytest.mark.parametrize(
    "path", ["input.gone", "input.list[2]", "input.list[-3]", "input.value.x", "input.list.x", "input[0]"]
)
def test_what_is_not_there_is_named(path: str) -> None:
    with pytest.raises(MainspringError) as raised:
        rendered(f"say {{{{{path}}}}}", input={"value": 1, "list": ["secret", "b"]})
    assert raised.value.reason_name == "TEMPLATE_INVALID"
    assert raised.value.metadata == {"expression": path}
    assert "secret" not in raised.value.message


def test_a_template_without_holes_is_json_made_once() -> None:
    assert compile_template({"a": [1, "b"]}).constant == b'{"a":[1,"b"]}'
    assert compile_template({"a": ["{{b}}"]}).constant is None


def test_text_of_a_passed_through_string_has_no_quotes() -> None:
    template = compile_template("say {{a}}")
    assert template.render_text(Names(a=orjson.Fragment(b'"hi"'))) == "say hi"
    assert compile_template("{{a}}").render_text(Names(a=orjson.Fragment(b'{"b":1}'))) == '{"b":1}'


@given(JSON_VALUES)
def test_values_without_holes_come_out_as_they_went_in(value: object) -> None:
    assert rendered(value) == orjson.loads(orjson.dumps(value))


@given(st.lists(st.one_of(st.from_regex(r"[a-z]{1,6}", fullmatch=True), st.integers(-9, 9)), max_size=5))
def test_expressions_are_read_back_as_they_are_written(path: list[str | int]) -> None:
    text = "root" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    assert parse_expression(text) == Expression(text, "root", tuple(path))


@given(st.text(max_size=30))
def test_reading_an_expression_never_fails_otherwise(text: str) -> None:
    try:
        parse_expression(text)
    except MainspringError as error:
        assert error.reason_name == "TEMPLATE_INVALID"
