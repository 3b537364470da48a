"""Schemas that users hand in, and the faults of values in words."""

import pytest
from jsonschema import Draft202012Validator
from mainspring_kit.errors import Violation
from mainspring_registry.core.schema import faults_of, schema_faults

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"a": {"type": ["string", "null"], "pattern": "^a+$"}}},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://here.test/a", "type": "array"},
        {"$ref": "#/$defs/node", "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}}}},
        {"properties": {"a/b": {"allOf": [{"type": "string"}]}, "c": {"$ref": "#/properties/a~1b/allOf/0"}}},
        {"properties": {"$ref": {"type": "string"}, "$id": {"type": "string"}}},
        {"properties": {"tree": {"type": "array", "items": {"$ref": "#"}}}},
    ],
)
def test_a_good_schema_has_no_faults(schema: object) -> None:
    assert schema_faults(schema, "output_schema") == []
    Draft202012Validator.check_schema(schema)  # type: ignore[arg-type]  # objects, all of them


@pytest.mark.parametrize(
    ("schema", "field", "description"),
    [
        (True, "s", "must be an object"),
        ([], "s", "must be an object"),
        ({"type": "objekt"}, "s.type", "is no JSON Schema"),
        ({"properties": {"a": {"minimum": "1"}}}, "s.properties.a.minimum", "is no JSON Schema"),
        ({"allOf": [{"required": "a"}]}, "s.allOf[0].required", "is no JSON Schema"),
        ({"pattern": "("}, "s.pattern", "is no JSON Schema"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "s.$schema", "or left out"),
        ({"$schema": 4}, "s.$schema", "or left out"),
        ({"$ref": "https://elsewhere.test/schema"}, "s.$ref", "must point into this schema"),
        ({"$ref": "file:///etc/passwd"}, "s.$ref", "must point into this schema"),
        ({"items": [{}], "$ref": "other.json"}, "s.items", "is no JSON Schema"),
        ({"anyOf": [{"$dynamicRef": "#a"}]}, "s.anyOf[0].$dynamicRef", "must point into this schema"),
        ({"$ref": "#/$defs/a", "$defs": {}}, "s.$ref", "points at nothing"),
        ({"allOf": [{"$ref": "#/allOf/1"}]}, "s.allOf[0].$ref", "points at nothing"),
        ({"$ref": "#"}, "s.$ref", "points at itself"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "s.$defs.b.$ref", "points at itself"),
        ({"items": {"$id": "https://here.test/b"}}, "s.items.$id", "at the top only"),
    ],
)
def test_a_bad_schema_is_refused_with_the_path(schema: object, field: str, description: str) -> None:
    faults = schema_faults(schema, "s")
    assert faults, "no fault was found"
    assert faults[0].field == field
    assert description in faults[0].description


def test_faults_of_values_say_what_is_expected() -> None:
    schema = Draft202012Validator(
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["name", "size"],
            "properties": {
                "name": {"type": "string", "maxLength": 3},
                "kind": {"enum": ["a", "b"]},
                "tags": {
                    "type": "array",
                    "uniqueItems": True,
                    "items": {"pattern": "^[a-z]+$", "description": "words"},
                },
                "size": {"type": ["integer", "string"]},
            },
        }
    )
    value = {"name": "four", "kind": "c" * 200, "tags": ["A", "A"], "more": 1}
    assert faults_of(value, schema) == [
        Violation("kind", f"must be one of a, b, not '{'c' * 79}…"),
        Violation("more", "is not known here; known are kind, name, size, tags"),
        Violation("name", "has more than 3 characters"),
        Violation("size", "is required"),
        Violation("tags", "holds an entry twice"),
        Violation("tags[0]", "'A' is not words"),
        Violation("tags[1]", "'A' is not words"),
    ]
    assert faults_of({"name": "a", "size": 1.5}, schema) == [
        Violation("size", "must be an integer or text, not a number")
    ]
    assert faults_of(None, schema) == [Violation("", "must be an object, not null")]
