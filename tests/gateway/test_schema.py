"""JSON schemas as grammars: what they admit is valid, and what they cannot promise is refused."""

from __future__ import annotations

import re

import pytest

from meshnode.errors import RequestError
from meshnode.gateway.schema import DEPTH_MAX, SchemaGrammar, _digits


def grammar(schema):
    rules = SchemaGrammar()
    return rules.text(rules.add(schema, "schema"))


deep: dict = {"type": "string"}
for _ in range(DEPTH_MAX + 1):
    deep = {"type": "array", "items": deep}

REFUSED = [
    (3, "schema"),
    (False, "schema"),
    ({"type": "wizard"}, "schema.type"),
    ({"oneOf": []}, "schema.oneOf"),
    ({"allOf": []}, "schema.allOf"),
    ({"not": {}}, "schema.not"),
    ({"anyOf": []}, "schema.anyOf"),
    ({"type": "string", "pattern": "^a$"}, "schema.pattern"),
    ({"type": "string", "format": "date"}, "schema.format"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "schema.minLength"),
    ({"type": "string", "maxLength": 10**9}, "schema.maxLength"),
    ({"type": "number", "maximum": 3}, "schema.maximum"),
    ({"type": "number", "minimum": 1}, "schema.minimum"),
    ({"type": "integer", "minimum": 4, "maximum": 3}, "schema.minimum"),
    ({"type": "integer", "minimum": 0.5}, "schema.minimum"),
    ({"type": "integer", "multipleOf": 2}, "schema.multipleOf"),
    ({"type": "array", "uniqueItems": True}, "schema.uniqueItems"),
    ({"type": "object", "properties": {"a": {"not": {}}}}, "schema.properties.a.not"),
    ({"type": "object", "required": ["b"]}, "schema.required"),
    ({"type": "object", "patternProperties": {}}, "schema.patternProperties"),
    ({"enum": []}, "schema.enum"),
    ({"enum": ["a"], "type": "integer"}, "schema"),
    ({"$ref": "https://example.com/schema"}, "schema.$ref"),
    ({"$ref": "#/$defs/nothing"}, "schema.$ref"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "schema.$ref"),
    (deep, "schema" + ".items" * (DEPTH_MAX + 1)),
]


@pytest.mark.parametrize(("schema", "param"), REFUSED)
def test_what_cannot_be_promised_is_refused_by_name(schema, param):
    with pytest.raises(RequestError) as caught:
        grammar(schema)
    assert caught.value.param == param
    assert caught.value.code == "invalid_json_schema"


def test_annotations_say_nothing_and_shape_nothing():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    annotated = {"title": "T", "$schema": "x", **schema}
    annotated["properties"] = {"a": {"type": "string", "description": "d", "default": "x"}}
    assert grammar(annotated) == grammar(schema)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 9), (0, 100), (7, 7), (13, 452), (99, 101), (100, 999), (5, 1234)]
)
def test_a_range_matches_its_numbers_and_no_other(low, high):
    pattern = "|".join(_digits(low, high)).replace('"', "").replace(" ", "")
    matched = {n for n in range(3000) if re.fullmatch(pattern, str(n))}
    assert matched == set(range(low, high + 1))


def test_a_range_without_an_end():
    pattern = "|".join(_digits(38, None)).replace('"', "").replace(" ", "")
    assert {n for n in range(3000) if re.fullmatch(pattern, str(n))} == set(range(38, 3000))
