"""Documents: what YAML and JSON come to, and what is refused with its place."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring_registry.core.document import (
    DEPTH_MAX,
    INTEGER_MAX,
    VALUES_MAX,
    DocumentError,
    read_document,
    read_json,
    write_canonical,
)

pytestmark = pytest.mark.unit

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), INTEGER_MAX),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4))
)


def fault(document: bytes) -> str:
    with pytest.raises(DocumentError) as raised:
        read_document(document)
    violation = raised.value.violation
    return f"{violation.field}: {violation.description}" if violation.field else violation.description


@given(VALUES)
def test_json_reads_as_itself_and_canonical_json_is_one_text(value: object) -> None:
    document = json.dumps(value).encode()
    assert read_json(document) == value
    assert write_canonical(read_json(write_canonical(value).encode())) == write_canonical(value)


@given(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4))
def test_a_json_object_reads_the_same_as_a_document(value: dict[str, object]) -> None:
    assert read_document(json.dumps(value, indent=2).encode()) == value


def test_yaml_says_what_json_says() -> None:
    document = b"""
    text: plain words
    quoted: "yes"
    block: |
      two
      lines
    list: [1, -2, 2.5, 1e3, .5, true, False, null, ~, ]
    nothing:
    flow: {a, b: {c: d}}
    """
    assert read_document(document) == {
        "text": "plain words",
        "quoted": "yes",
        "block": "two\nlines\n",
        "list": [1, -2, 2.5, 1000.0, 0.5, True, False, None, None],
        "nothing": None,
        "flow": {"a": None, "b": {"c": "d"}},
    }


@pytest.mark.parametrize("text", ["yes", "off", "2026-11-24", "1:30", "0x1F", "1_000", "<<", ".nan", ".inf", "nUll"])
def test_what_yaml_means_by_surprise_is_text(text: str) -> None:
    assert read_document(f"value: {text}".encode()) == {"value": text}


def test_a_key_is_text_whatever_it_looks_like() -> None:
    assert read_document(b"1: a\ntrue: b\n~: c") == {"1": "a", "true": "b", "~": "c"}


def test_a_byte_order_mark_is_no_character() -> None:
    assert read_document("\ufeffa: b".encode()) == {"a": "b"}


def test_a_brace_may_begin_yaml_too() -> None:
    assert read_document(b"{a: b, c: [d]}") == {"a": "b", "c": ["d"]}


def test_json_may_escape_what_yaml_may_not() -> None:
    assert read_document(b'{"face": "\\ud83d\\ude00"}') == {"face": "\U0001f600"}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (b"a: b: c", "line 1, column 5: is neither YAML nor JSON: mapping values are not allowed in this context"),
        (b"a: 1\nb: &x 2", "line 2, column 4: anchors and aliases are not taken: write the value out"),
        (b"a: *x", "line 1, column 4: anchors and aliases are not taken: write the value out"),
        (b"a: !!python/name:os.system x", "line 1, column 4: tags are not taken: write a plain value"),
        (b"a: !!str 1", "line 1, column 4: tags are not taken: write a plain value"),
        (b"a: 1\nb: 2\na: 3", "line 3, column 1: has the key 'a' twice in one mapping"),
        (b'{"a": 1, "b": {"a": 1, "a": 2}}', "has the key 'a' twice in one object"),
        (b"? [a]\n: b", "line 1, column 3: a key must be plain text"),
        (b"a: 1\n---\nb: 2", "line 2, column 1: a second document begins: send one at a time"),
        (b'{"a": NaN}', "holds NaN, which is no JSON value"),
        (b'{"a": [1, 1e999]}', "a[1]: is a number too large: write it as text"),
        (b"a: 9223372036854775808", "a: is a number outside 64 bits: write it as text"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds a number outside 64 bits: write it as text"),
        (b'{"a": {"b": "x\\u0000"}}', "a.b: holds a NUL character"),
        (b'{"a": "\\ud800"}', "a: holds half a surrogate pair, which is no character"),
        (b'{"\\u0000": 1}', "holds a NUL character"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_place(document: bytes, expected: str) -> None:
    assert fault(document) == expected


@pytest.mark.parametrize("document", [b"[" * 100_000, b'{"a":' * 50_000, b"- " * 50_000, b"{a: " * 900])
def test_deep_nesting_is_refused_whatever_its_depth(document: bytes) -> None:
    assert "nest" in fault(document) or "deep" in fault(document)


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
def test_nesting_is_taken_up_to_its_bound(brackets: tuple[str, str]) -> None:
    def nest(depth: int) -> bytes:
        return (brackets[0] * depth + "1" + brackets[1] * depth).encode()

    read_document(nest(DEPTH_MAX))
    assert fault(nest(DEPTH_MAX + 1)).endswith(f"is nested deeper than {DEPTH_MAX}")


def test_values_are_taken_up_to_their_bound() -> None:
    read_document(b"[" + b"1," * (VALUES_MAX - 2) + b"1]")
    assert fault(b"[" + b"1," * VALUES_MAX + b"1]") == f"holds more than {VALUES_MAX} values"


def test_what_must_be_json_is_not_read_as_yaml() -> None:
    with pytest.raises(DocumentError, match="is not JSON: Expecting value at line 1, column 1"):
        read_json(b"type: object")


def test_canonical_json_has_sorted_keys_and_no_spaces() -> None:
    assert write_canonical({"b": [1, {"d": "ä", "c": None}], "a": True}) == '{"a":true,"b":[1,{"c":null,"d":"ä"}]}'
    with pytest.raises(ValueError, match="Out of range"):
        write_canonical(math.nan)
