"""Templates of scripts, `{{input.value}}`: names, `.field` and `[index]`, nothing else; compiled once per version."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import orjson
from mainspring_kit.errors import MainspringError, Reason

_HOLE: Final = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_ROOT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What all holes that share a bound may grow to together, so that `{{input}}` a thousand times is no bomb.
RENDERED_BYTES_MAX: Final = 16 << 20
_STEP: Final = re.compile(r"\.([A-Za-z_][A-Za-z0-9_-]*)|\[(-?\d{1,6})\]")

PathStep = str | int


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression: its text, the name it begins with and the steps that follow."""

    text: str
    root: str
    path: tuple[PathStep, ...]


class Scope(Protocol):
    """What expressions are evaluated against. Values are JSON values: Any."""

    def look_up(self, expression: Expression) -> Any:
        """The expression's value; TEMPLATE_INVALID when it is not there."""
        ...


# What a compiled template does: gives its value in a scope. Values are JSON values: Any.
Render = Callable[[Scope], Any]


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled JSON value with holes. `constant` is its JSON where it has none."""

    constant: bytes | None
    expressions: tuple[Expression, ...]
    _render: Render

    def render(self, scope: Scope) -> Any:
        """The value with its holes filled."""
        return self._render(scope)

    def render_text(self, scope: Scope) -> str:
        """The same as text: strings as they are, anything else as JSON."""
        return _as_text(self.render(scope))

    def render_json(self, scope: Scope) -> bytes:
        """The same as JSON."""
        return self.constant if self.constant is not None else _dump(self.render(scope))


class Bounded:
    """A scope whose values are together no larger than a payload may be."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._left = RENDERED_BYTES_MAX

    def look_up(self, expression: Expression) -> Any:
        """As the scope's; PAYLOAD_TOO_LARGE past the bound. A JSON value: Any."""
        value = self._scope.look_up(expression)
        self._left -= len(value) if isinstance(value, str) else len(_dump(value))
        if self._left < 0:
            raise MainspringError(
                Reason.PAYLOAD_TOO_LARGE,
                f"The values that one step of the script fills in take more than {RENDERED_BYTES_MAX} bytes: pass "
                "them on by reference.",
                field=expression.text[:200],
                bytes=RENDERED_BYTES_MAX - self._left,
                limit=RENDERED_BYTES_MAX,
            )
        return value


def compile_template(value: Any) -> Template:
    """Compiles a JSON value; TEMPLATE_INVALID for an expression that no scope could evaluate."""
    expressions: list[Expression] = []
    render = _compile(value, expressions)
    if not expressions:
        return Template(orjson.dumps(value), (), lambda _: value)
    return Template(None, tuple(expressions), render)


def parse_expression(text: str) -> Expression:
    """Reads `name.field[0]`; TEMPLATE_INVALID when it is anything else."""
    source = text.strip()
    root = _ROOT.match(source)
    position = root.end() if root else 0
    path: list[PathStep] = []
    while root and position < len(source):
        step = _STEP.match(source, position)
        if step is None:
            break
        path.append(step[1] if step[1] is not None else int(step[2]))
        position = step.end()
    if root is None or position < len(source):
        raise template_invalid(source, "only names, .field and [index] are allowed")
    return Expression(source, root[0], tuple(path))


def walk(expression: Expression, value: Any, *, path: tuple[PathStep, ...]) -> Any:
    """Follows the steps of a path; TEMPLATE_INVALID where one leads nowhere."""
    for step in path:
        if isinstance(step, str):
            if not isinstance(value, dict) or step not in value:
                raise template_invalid(expression.text, f"there is no field {step!r} in {_outline(value)}")
            value = value[step]
            continue
        if not isinstance(value, list) or not -len(value) <= step < len(value):
            raise template_invalid(expression.text, f"there is no item {step} in {_outline(value)}")
        value = value[step]
    return value


def template_invalid(expression: str, fault: str) -> MainspringError:
    """The error of an expression that cannot be read or has no value."""
    return MainspringError(
        Reason.TEMPLATE_INVALID,
        f"The template {{{{{expression[:200]}}}}} has no value: {fault}. Correct the agent's script or its input.",
        expression=expression[:200],
    )


def _outline(value: Any) -> str:
    """What a value is, never what it holds: it may be a user's secret."""
    if isinstance(value, dict):
        return "an object of " + (", ".join(list(value)[:10]) or "no fields")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "null" if value is None else f"a {type(value).__name__}"


def _compile(value: Any, expressions: list[Expression]) -> Render:
    if isinstance(value, str):
        return _compile_text(value, expressions)
    if isinstance(value, dict):
        fields = [(key, _compile(item, expressions)) for key, item in value.items()]
        return lambda scope: {key: render(scope) for key, render in fields}
    if isinstance(value, list):
        items = [_compile(item, expressions) for item in value]
        return lambda scope: [render(scope) for render in items]
    return lambda _: value


def _compile_text(value: str, expressions: list[Expression]) -> Render:
    whole = _HOLE.fullmatch(value)
    if whole is not None and "{{" not in whole[1]:
        expression = parse_expression(whole[1])
        expressions.append(expression)
        return lambda scope: scope.look_up(expression)
    pieces: list[str | Expression] = []
    for index, piece in enumerate(_HOLE.split(value)):
        pieces.append(parse_expression(piece) if index % 2 else piece)
    found = [piece for piece in pieces if isinstance(piece, Expression)]
    if not found:
        return lambda _: value
    expressions.extend(found)
    return lambda scope: "".join(
        piece if isinstance(piece, str) else _as_text(scope.look_up(piece)) for piece in pieces
    )


def _as_text(value: Any) -> str:
    if isinstance(value, orjson.Fragment):
        value = orjson.loads(orjson.dumps(value))
    return value if isinstance(value, str) else _dump(value).decode()


def _dump(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise template_invalid("…", f"what it yields cannot be written as JSON: {error}") from error
