"""How a function becomes a tool: `@tool`, the schema made of its hints and docstring, and its context."""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from types import FunctionType
from typing import Annotated, Any, Final, Literal, NotRequired, TypeVar, get_type_hints, overload

import orjson
from pydantic import BaseModel, ConfigDict, Field, PydanticSchemaGenerationError, TypeAdapter
from typing_extensions import TypedDict

from mainspring.errors import DeclarationError
from mainspring.v1 import dispatcher_pb2, types_pb2

Effect = Literal["pure", "idempotent", "keyed", "unsafe"]
Function = TypeVar("Function", bound=Callable[..., Any])

TIMEOUT_SECONDS_DEFAULT: Final = 30.0
TIMEOUT_SECONDS_MAX: Final = 3_600.0
DESCRIPTION_BYTES_MAX: Final = 4 << 10

_MARK: Final = "__mainspring_tool__"
_NAME: Final = re.compile(r"[a-z][a-z0-9]*([._-][a-z0-9]+)*")
_NAME_CHARACTERS_MAX: Final = 128
# Any: types are made of them at run time, which no checker follows.
_ANNOTATED: Final[Any] = Annotated
_NOT_REQUIRED: Final[Any] = NotRequired
_TYPED_DICT: Final[Any] = TypedDict
_EFFECTS: Final = {
    "pure": types_pb2.EFFECT_CLASS_PURE,
    "idempotent": types_pb2.EFFECT_CLASS_IDEMPOTENT,
    "keyed": types_pb2.EFFECT_CLASS_KEYED,
    "unsafe": types_pb2.EFFECT_CLASS_UNSAFE,
}


@dataclass(frozen=True, slots=True)
class ToolContext:
    """For whom a tool runs and as which call; a parameter with this annotation gets it and is no part of the schema.

    A keyed tool uses `call_id` as its key: it is the same over all attempts. A function that runs in a thread looks at
    `cancelled` now and then, for a thread cannot be stopped from outside.
    """

    tenant_id: str
    user_id: str
    session_id: str
    run_id: str
    request_id: str
    parent_request_id: str
    depth: int
    roles: tuple[str, ...]
    trace_id: str
    deadline: datetime | None
    call_id: str
    attempt: int
    cancel_flag: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    @property
    def cancelled(self) -> bool:
        """Nobody wants the result any more: the call was cancelled or ran out of time."""
        return self.cancel_flag.is_set()

    @classmethod
    def of(cls, call: dispatcher_pb2.WorkerCall) -> ToolContext:
        """The context that a call carries."""
        context = call.context
        return cls(
            tenant_id=context.tenant_id,
            user_id=context.user_id,
            session_id=context.session_id,
            run_id=context.run_id,
            request_id=context.request_id,
            parent_request_id=context.parent_request_id,
            depth=context.depth,
            roles=tuple(context.roles),
            trace_id=context.trace_id,
            deadline=context.deadline.ToDatetime(UTC) if context.HasField("deadline") else None,
            call_id=call.call_id,
            attempt=call.attempt,
        )


@dataclass(frozen=True, slots=True)
class _Mark:
    """What `@tool` was told."""

    name: str
    effect: Effect
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Declaration:
    """A tool as a worker serves it."""

    name: str
    description: str
    effect: Effect
    timeout_seconds: float
    input_schema: bytes
    function: Callable[..., Any]
    is_async: bool
    context_parameter: str
    arguments: TypeAdapter[dict[str, Any]]

    def to_message(self) -> types_pb2.Tool:
        """The tool as it is registered."""
        message = types_pb2.Tool(
            name=self.name,
            description=self.description,
            input_schema=self.input_schema,
            effect=_EFFECTS[self.effect],
        )
        message.timeout.FromNanoseconds(int(self.timeout_seconds * 1e9))
        return message


@overload
def tool(function: Function) -> Function: ...


@overload
def tool(
    *, name: str = "", effect: Effect = "unsafe", timeout: float = TIMEOUT_SECONDS_DEFAULT
) -> Callable[[Function], Function]: ...


def tool(
    function: Function | None = None,
    *,
    name: str = "",
    effect: Effect = "unsafe",
    timeout: float = TIMEOUT_SECONDS_DEFAULT,
) -> Function | Callable[[Function], Function]:
    """Declares a function, `async` or not, to be a tool; the function itself stays as it is.

    `effect` says what a second execution of the same call would do, and so what happens when a worker dies in mid-call:
    `pure` and `idempotent` tools and `keyed` ones (which de-duplicate by `ToolContext.call_id`) are called again, an
    `unsafe` one is not. `timeout` is in seconds, for one attempt. The name is the function's unless given.
    """
    if function is None:
        return partial(_mark, name=name, effect=effect, timeout_seconds=timeout)
    return _mark(function, name=name, effect=effect, timeout_seconds=timeout)


def is_tool(value: object) -> bool:
    """Whether `@tool` marked it."""
    return isinstance(value, FunctionType) and isinstance(getattr(value, _MARK, None), _Mark)


def declare(function: Callable[..., Any]) -> Declaration:
    """The declaration of a function marked by `@tool`; DeclarationError when its signature does not make a schema."""
    mark: _Mark = getattr(function, _MARK)
    docstring = inspect.getdoc(function) or ""
    descriptions = _parameter_descriptions(docstring)
    try:
        hints = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
    except (NameError, TypeError, ValueError) as error:
        raise _refused(function, f"its type hints cannot be read: {error}") from error
    fields: dict[str, Any] = {}  # Any: annotations are made at run time
    context_parameter, extra = "", False
    for parameter in signature.parameters.values():
        if hints.get(parameter.name) is ToolContext:
            context_parameter = parameter.name
        elif parameter.kind is parameter.VAR_KEYWORD:
            extra = True
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise _refused(function, f"{parameter} cannot be passed by name; arguments of tools have names")
        elif parameter.name not in hints:
            raise _refused(function, f"the parameter {parameter.name} has no type hint")
        else:
            described = descriptions.get(parameter.name)
            fields[parameter.name] = _field(hints[parameter.name], parameter, description=described)
    arguments = _adapter(function, fields, allow_extra=extra)
    return Declaration(
        name=mark.name,
        description=_clip(_description(docstring)),
        effect=mark.effect,
        timeout_seconds=mark.timeout_seconds,
        input_schema=orjson.dumps(arguments.json_schema()),
        function=function,
        is_async=asyncio.iscoroutinefunction(function),
        context_parameter=context_parameter,
        arguments=arguments,
    )


def to_json(value: object) -> bytes:
    """A result as JSON: what orjson knows (dataclasses, dates, UUIDs too) and pydantic models; else TypeError."""
    return orjson.dumps(value, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError  # orjson names the type


def _mark(function: Function, *, name: str, effect: Effect, timeout_seconds: float) -> Function:
    chosen = name or function.__name__
    if not _NAME.fullmatch(chosen) or len(chosen) > _NAME_CHARACTERS_MAX:
        raise _refused(
            function,
            f"{chosen!r} is not a tool's name: lower-case words joined by dots, dashes and underscores, "
            f"at most {_NAME_CHARACTERS_MAX} characters; give one with @tool(name=…)",
        )
    if effect not in _EFFECTS:
        raise _refused(function, f"effect={effect!r}: use one of {', '.join(_EFFECTS)}")
    if not 0.001 <= timeout_seconds <= TIMEOUT_SECONDS_MAX:
        raise _refused(function, f"timeout={timeout_seconds}: use 0.001 to {TIMEOUT_SECONDS_MAX:g} seconds")
    setattr(function, _MARK, _Mark(chosen, effect, float(timeout_seconds)))
    return function


def _field(hint: object, parameter: inspect.Parameter, *, description: str | None) -> object:
    extra: dict[str, Any] = {}  # Any: JSON
    if parameter.default is not parameter.empty:
        try:
            extra["default"] = orjson.loads(to_json(parameter.default))
        except TypeError:
            extra = {}  # a default that JSON cannot say is the function's own affair
    annotated = _ANNOTATED[hint, Field(description=description, json_schema_extra=extra)]
    return annotated if parameter.default is parameter.empty else _NOT_REQUIRED[annotated]


def _adapter(function: Callable[..., Any], fields: dict[str, Any], *, allow_extra: bool) -> TypeAdapter[dict[str, Any]]:
    shape = _TYPED_DICT(function.__name__, fields)
    shape.__pydantic_config__ = ConfigDict(extra="allow" if allow_extra else "forbid")
    try:
        return TypeAdapter(shape)
    except PydanticSchemaGenerationError as error:
        raise _refused(function, f"a parameter's type has no JSON schema: {error}") from error


def _refused(function: Callable[..., Any], why: str) -> DeclarationError:
    return DeclarationError(f"The tool {function.__module__}.{function.__qualname__} cannot be declared: {why}.")


_SECTION: Final = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$")
_ENTRY: Final = re.compile(r"^(?P<name>\w+)\s*(\([^)]*\))?:\s*(?P<text>.*)$")
_FIELD: Final = re.compile(r"^:(param|parameter|arg)\s+(\S+\s+)?(?P<name>\w+):\s*(?P<text>.*)$")


def _description(docstring: str) -> str:
    """The docstring up to its first section or field: what the model reads."""
    lines: list[str] = []
    for line in docstring.splitlines():
        if _SECTION.match(line) or line.startswith(":"):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _parameter_descriptions(docstring: str) -> dict[str, str]:
    """What the docstring says of each parameter, as `Args:` with `name: text`, or as `:param name: text`."""
    found: dict[str, str] = {}
    current, in_section, indent = "", False, 0
    for line in docstring.splitlines():
        text = line.strip()
        if match := _FIELD.match(line):
            current, in_section = match["name"], False
            found[current] = match["text"]
        elif section := _SECTION.match(line):
            current, in_section, indent = "", section[1] in ("Args", "Arguments", "Parameters"), 0
        elif in_section and text and line.startswith(" "):
            depth = len(line) - len(line.lstrip())
            indent = indent or depth
            entry = _ENTRY.match(text)
            if depth <= indent and entry:
                current = entry["name"]
                found[current] = entry["text"]
            elif current:
                found[current] = f"{found[current]} {text}".strip()
        elif current and text and line.startswith(" "):
            found[current] = f"{found[current]} {text}".strip()
        else:
            current = ""
    return found


def _clip(text: str) -> str:
    return text.encode()[:DESCRIPTION_BYTES_MAX].decode(errors="ignore")
