"""From a JSON schema to a grammar that admits nothing else. Pure.

Decides which schemas can be promised. A keyword either shapes the grammar, is a mere annotation,
or is refused by name: an answer that passes the grammar is valid under the schema. Does not know
llama.cpp beyond its notation (GBNF), nor tools, nor models.

Objects have their properties in the order of the schema, and no space but one after `:` and `,`:
a small model that may write blanks may write nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from meshnode.errors import RequestError

__all__ = ["SchemaGrammar"]

# Deeper or wider ones make grammars that llama.cpp walks for seconds per token.
DEPTH_MAX = 32
RULES_MAX = 2000
# llama.cpp writes out each repetition of a counted one, up to this many.
REPEAT_MAX = 1000

_VALUE = """\
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" (string ": "  value (", " string ": " value)*)? "}"
array ::= "[" (value (", " value)*)? "]"
string ::= "\\"" char* "\\""
char ::= [^"\\\\\\x7F\\x00-\\x1F] | "\\\\" (["\\\\/bfnrt] | "u" [0-9a-fA-F]{4})
number ::= "-"? unsigned
unsigned ::= ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?
integer ::= "-"? ("0" | [1-9] [0-9]{0,15})
"""

_ANNOTATIONS = frozenset({
    "$comment", "$id", "$schema", "default", "deprecated", "description", "example", "examples",
    "readOnly", "title", "writeOnly",
})  # fmt: skip
_DEFINITIONS = frozenset({"$defs", "definitions"})
_FOR_TYPE: dict[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum"}),
    "boolean": frozenset(),
    "null": frozenset(),
}


class SchemaGrammar:
    """The rules of one grammar, for one or several schemas of a request."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self._refs: dict[tuple[int, str], str] = {}

    def add(self, schema: Any, param: str) -> str:
        """Add a schema; returns the name of its rule.

        `param` is where it stands in the request. Raises `RequestError` naming what in it cannot
        be promised.
        """
        return self._any(schema, _Place(schema, param, 0))

    def rule(self, body: str) -> str:
        """Add a rule of one's own; returns its name."""
        return self._add("r", body)

    def mark(self) -> tuple[int, int]:
        """Where the rules are now, for `forget`."""
        return len(self._rules), len(self._refs)

    def forget(self, mark: tuple[int, int]) -> None:
        """Take back all rules since then, of a schema that was refused in its midst."""
        rules, refs = mark
        del self._rules[rules:]
        for ref in list(self._refs)[refs:]:
            del self._refs[ref]

    def text(self, root: str) -> str:
        """The whole grammar in GBNF, `root` being the body of its first rule."""
        return f"root ::= {root}\n" + "\n".join(self._rules) + "\n" + _VALUE

    def _add(self, prefix: str, body: str) -> str:
        name = f"{prefix}{len(self._rules)}"
        self._rules.append(f"{name} ::= {body}")
        return name

    # -- one schema ----------------------------------------------------------------------------

    def _any(self, schema: Any, place: _Place) -> str:
        if place.depth > DEPTH_MAX or len(self._rules) > RULES_MAX:
            raise place.refuse("is part of too large a schema")
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise place.refuse("must be a schema")
        kind = schema.get("type")
        given = schema.keys() - _ANNOTATIONS
        if place.depth == 0:
            given -= _DEFINITIONS
        if "$ref" in schema:
            place.check(given, {"$ref", "type"})
            return self._ref(schema["$ref"], place)
        if "enum" in schema or "const" in schema:
            place.check(given, {"enum", "const", "type"})
            return self._literals(schema, place)
        if "anyOf" in schema:
            place.check(given, {"anyOf"})
            return self._choice(schema["anyOf"], place.at("anyOf"))
        if isinstance(kind, list) and kind:
            known = set().union(*(_FOR_TYPE.get(str(each), ()) for each in kind))
            place.check(given, known | {"type"})
            return self._choice(
                [
                    {key: value for key, value in schema.items()
                     if key in _FOR_TYPE.get(str(each), ())} | {"type": each}
                    for each in kind
                ],
                place.at("type"),
            )  # fmt: skip
        if kind is None and "properties" in schema:
            kind = "object"
        if not isinstance(kind, str) or kind not in _FOR_TYPE:
            first = next(iter(sorted(given - {"type"})), "type")
            raise place.at(first).refuse("is not supported")
        place.check(given, _FOR_TYPE[kind] | {"type"})
        match kind:
            case "object":
                return self._object(schema, place)
            case "array":
                return self._array(schema, place)
            case "string":
                return self._string(schema, place)
            case "integer":
                return self._integer(schema, place)
            case "number":
                if "minimum" not in schema:
                    return "number"
                if schema["minimum"] != 0 or isinstance(schema["minimum"], bool):
                    raise place.at("minimum").refuse("can only be 0 for a number")
                return "unsigned"
            case "boolean":
                return self._add("b", '"true" | "false"')
            case _:
                return self._add("n", '"null"')

    def _ref(self, ref: Any, place: _Place) -> str:
        """A rule that may be used before it is written, so that schemas may contain themselves."""
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise place.at("$ref").refuse("must point into the schema itself")
        known = self._refs.get((id(place.root), ref))
        if known is not None:
            return known
        found = place.root
        for step in ref.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or step not in found:
                raise place.at("$ref").refuse("points to nothing")
            found = found[step]
        if isinstance(found, dict) and "$ref" in found:
            raise place.at("$ref").refuse("points to another `$ref`")
        name = self._refs[id(place.root), ref] = self._add("ref", "")
        at = len(self._rules) - 1
        if ref == "#" and isinstance(found, dict):
            found = {key: found[key] for key in found.keys() - _DEFINITIONS}
        body = self._any(found, place.at("$ref"))
        self._rules[at] = f"{name} ::= {body}"
        return name

    def _literals(self, schema: dict[str, Any], place: _Place) -> str:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not values or len(values) > RULES_MAX:
            raise place.at("enum").refuse("must be a list of values")
        kinds = schema.get("type")
        for value in values:
            kind = _kind(value)
            wanted = [kinds] if isinstance(kinds, str) else kinds
            if wanted and kind not in wanted and not (kind == "integer" and "number" in wanted):
                raise place.refuse("has a value that is not of its `type`")
        return self._add("e", " | ".join(_literal(_dumps(value)) for value in values))

    def _choice(self, options: Any, place: _Place) -> str:
        if not isinstance(options, list) or not options:
            raise place.refuse("must be a list of schemas")
        names = [self._any(option, place.at(str(i))) for i, option in enumerate(options)]
        return self._add("a", " | ".join(names))

    def _object(self, schema: dict[str, Any], place: _Place) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict):
            raise place.at("properties").refuse("must be an object")
        if not isinstance(required, list) or not all(
            isinstance(each, str) and each in properties for each in required
        ):
            raise place.at("required").refuse("must be a list of names in `properties`")
        more = schema.get("additionalProperties", not properties)
        if properties and more not in (True, False):
            raise place.at("additionalProperties").refuse("must be false beside `properties`")
        pairs = [
            (name in required, f"{_literal(_dumps(name) + ': ')} "
             + self._any(value, place.at("properties").at(name)))
            for name, value in properties.items()
        ]  # fmt: skip
        if not pairs:
            if more is False:
                return self._add("o", '"{}"')
            value = self._any(more, place.at("additionalProperties"))
            pair = f'string ": " {value}'
            return self._add("o", f'"{{" ({pair} (", " {pair})*)? "}}"')
        return self._add("o", f'"{{" {self._pairs(pairs)} "}}"')

    def _pairs(self, pairs: Sequence[tuple[bool, str]]) -> str:
        """Each pair in order, those not required perhaps; a comma between any two.

        From the end: `rest` is what may follow when something stands before, `first` when
        nothing does.
        """
        rest, first = '""', '""'
        for is_required, pair in reversed(pairs):
            with_comma = f'", " {pair} {rest}'
            alone = f"{pair} {rest}"
            if is_required:
                first = self._add("p", alone)
                rest = self._add("p", with_comma)
            else:
                first = self._add("p", f"{alone} | {first}")
                rest = self._add("p", f"({with_comma}) | {rest}")
        return first

    def _array(self, schema: dict[str, Any], place: _Place) -> str:
        item = self._any(schema.get("items", True), place.at("items"))
        least, most = _bounds(schema, "minItems", "maxItems", place)
        if most == 0:
            return self._add("l", '"[]"')
        more = f'(", " {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        body = f"{item} {more}"
        return self._add("l", f'"[" {body} "]"' if least else f'"[" ({body})? "]"')

    def _string(self, schema: dict[str, Any], place: _Place) -> str:
        least, most = _bounds(schema, "minLength", "maxLength", place)
        if (least, most) == (0, None):
            return "string"
        # One escape is one character, but for those of a pair of surrogates, which are not needed.
        plain = r'[^"\\\x7F\x00-\x1F] | "\\" ["\\/bfnrt]'
        return self._add("s", f'"\\"" ({plain}){{{least},{"" if most is None else most}}} "\\""')

    def _integer(self, schema: dict[str, Any], place: _Place) -> str:
        low, high = _limit(schema, "minimum", 1, place), _limit(schema, "maximum", -1, place)
        if low is None and high is None:
            return "integer"
        if low is not None and high is not None and low > high:
            raise place.at("minimum").refuse("is above the maximum")
        options: list[str] = []
        if low is None or low < 0:
            # Mirrored: -high..-low without the sign, zero left to the other half.
            least = 1 if high is None or high >= 0 else -high
            options += [f'"-" {each}' for each in _digits(least, None if low is None else -low)]
        if high is None or high >= 0:
            options += _digits(max(low or 0, 0), high)
        return self._add("i", " | ".join(options))


class _Place:
    """Where in a request we are, for messages and bounds."""

    def __init__(self, root: Any, param: str, depth: int) -> None:
        self.root = root
        self.param = param
        self.depth = depth

    def at(self, step: str) -> _Place:
        # A name of the client's own goes into our message: shortened.
        return _Place(self.root, f"{self.param}.{step[:64]}", self.depth + 1)

    def check(self, given: Iterable[str], known: set[str] | frozenset[str]) -> None:
        for keyword in sorted(given):
            if keyword not in known:
                raise self.at(keyword).refuse("is not supported")

    def refuse(self, why: str) -> RequestError:
        return RequestError(f"`{self.param}` {why}.", param=self.param, code="invalid_json_schema")


def _bounds(schema: dict[str, Any], least: str, most: str, place: _Place) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    for name, value in ((least, low), (most, high)):
        if value is not None and (type(value) is not int or not 0 <= value <= REPEAT_MAX):
            raise place.at(name).refuse(f"must be an integer from 0 to {REPEAT_MAX}")
    if high is not None and low > high:
        raise place.at(least).refuse(f"is above `{most}`")
    return low, high


def _limit(schema: dict[str, Any], name: str, step: int, place: _Place) -> int | None:
    """An inclusive bound, of the two ways to give it the narrower one."""
    exclusive = "exclusive" + name.capitalize()
    found: list[int] = []
    for key, shift in ((name, 0), (exclusive, step)):
        value = schema.get(key)
        if value is None:
            continue
        if type(value) is not int or abs(value) >= 10**15:
            raise place.at(key).refuse("must be an integer of at most 15 digits")
        found.append(value + shift)
    if not found:
        return None
    return max(found) if step > 0 else min(found)


def _digits(low: int, high: int | None) -> list[str]:
    """What matches the integers low..high in decimal; both at least 0, high None for no end."""
    if high is None:
        width = len(str(low))
        longer = f"[1-9] [0-9]{{{width},15}}"
        return [*_digits(low, 10**width - 1), longer]
    options = []
    for width in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (width - 1) if width > 1 else 0)
        last = min(high, 10**width - 1)
        options.append(_span(str(first), str(last)))
    return options


def _span(low: str, high: str) -> str:
    """What matches the numbers between two of equal width."""
    if low == high:
        return f'"{low}"'
    if len(low) == 1:
        return f"[{low}-{high}]"
    if low[0] == high[0]:
        return f'"{low[0]}" {_span(low[1:], high[1:])}'
    rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    options = []
    if low[1:] != "0" * rest:
        options.append(f'"{first}" {_span(low[1:], "9" * rest)}')
        first += 1
    if high[1:] != "9" * rest:
        options.append(f'"{last}" {_span("0" * rest, high[1:])}')
        last -= 1
    if first <= last:
        options.append(f"[{first}-{last}] [0-9]{{{rest}}}")
    return f"({' | '.join(options)})"


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array",
             dict: "object", type(None): "null"}  # fmt: skip
    return kinds[type(value)]


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _literal(text: str) -> str:
    """Text as GBNF quotes it."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(character, character) for character in text) + '"'
