"""What happens around every call, from outside in: telemetry, errors, deadline, identity and role, validation."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import grpc
import protovalidate
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status
from mainspring.v1 import identity_pb2

from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError, Reason, Violation, to_status
from mainspring_kit.identity import CONTEXT_KEY, Caller, TokenVerifier, UserExecutionContext, caller_variable, new_id
from mainspring_kit.streams import call_tasks
from mainspring_kit.tasks import background

# Health and reflection answer without a token: probes have none, and they tell nothing of any tenant.
OPEN_SERVICES: Final = ("/grpc.health.v1.Health/", "/grpc.reflection.")
CALLS_PER_USER_MAX: Final = 256
_PEER_GONE: Final = (asyncio.CancelledError, grpc.aio.InternalError, grpc.aio.UsageError)  # grpc.aio's, of a write

# grpc.aio's handlers and contexts are generic over messages that only the generated code knows: Any.
ServicerContext = grpc.aio.ServicerContext[Any, Any]
_Read = Callable[[bytes], Any]


class Guard(grpc.aio.ServerInterceptor):
    """Lets a call through to its servicer only when it may and can be served, and translates what is raised."""

    def __init__(self, services: Iterable[ServiceDescriptor], verifier: TokenVerifier) -> None:
        self._roles = {
            f"/{service.full_name}/{method.name}": method.GetOptions().Extensions[identity_pb2.role]
            for service in services
            for method in service.methods
        }
        self._verifier = verifier
        self._under_way: Counter[tuple[str, str]] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the method's handler; an open service's is left as it is."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(OPEN_SERVICES):
            return handler
        read, out = _reader(handler.request_deserializer), handler.response_serializer
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(self._streaming(method, handler.stream_stream), read, out)
        if handler.response_streaming:
            call = self._streaming(method, handler.unary_stream, read=read)
            return grpc.unary_stream_rpc_method_handler(call, None, out)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary, read=read), None, out)

    def _unary(self, method: str, behaviour: Any, *, read: _Read) -> Callable[..., Awaitable[Any]]:
        async def call(data: bytes, context: ServicerContext) -> Any:
            async with _Span(method, context, streaming=False):
                with self._admit(method, context):
                    validate(request := read(data))
                    return await behaviour(request, context)

        return call

    def _streaming(self, method: str, behaviour: Any, *, read: _Read | None = None) -> Callable[..., Awaitable[None]]:
        async def call(request: Any, context: ServicerContext) -> None:
            async with _Span(method, context, streaming=True), background() as tasks:
                with self._admit(method, context) as caller:
                    if read is not None:
                        validate(request := read(request))
                    await context.send_initial_metadata(())  # with a first write it could be cut off, and block the end
                    call_tasks.set(tasks)
                    responses = behaviour(request, context)
                    # A service's stays: an unsafe call under way would be lost with its stream.
                    until = None if caller.principal.is_service else caller.principal.expire_time - time.time()
                    try:
                        async with asyncio.timeout(until) as expiry:
                            async for response in responses:
                                await context.write(response)
                    except TimeoutError as error:
                        raise caller.principal.expired() if expiry.expired() else error from None
                    finally:
                        await responses.aclose()

        return call

    @contextmanager
    def _admit(self, method: str, context: ServicerContext) -> Iterator[Caller]:
        """Identifies the caller, checks deadline, role and bound, and leaves the caller for the servicer to read."""
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise MainspringError(Reason.DEADLINE_EXCEEDED, "The deadline has passed already.", method=method)
        metadata = dict(context.invocation_metadata() or ())
        principal = self._verifier.verify(bearer_token(metadata))
        role = self._roles.get(method, identity_pb2.ROLE_UNSPECIFIED)
        if not principal.covers(role):
            name = identity_pb2.Role.Name(role)[5:].lower()
            message = f"{method} needs the role {name}; the token has {', '.join(principal.roles)}: get one with it."
            raise MainspringError(Reason.ROLE_REQUIRED, message, method=method, role=name)
        user_context = None
        if not principal.is_service:
            user_context = UserExecutionContext(
                tenant_id=principal.tenant_id,
                user_id=principal.user_id,
                request_id=new_id(),
                roles=principal.roles,
                trace_id=trace_id_of(metadata),
            )
        elif CONTEXT_KEY in metadata:
            user_context = _decode_context(metadata[CONTEXT_KEY])
        caller_variable.set(caller := Caller(principal, user_context))
        user = (principal.tenant_id, principal.user_id)
        if not principal.is_service and self._under_way[user] >= CALLS_PER_USER_MAX:
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"The user has {CALLS_PER_USER_MAX} calls under way in this process: wait for answers first.",
                queue="calls of the user",
                limit=CALLS_PER_USER_MAX,
            )
        self._under_way[user] += 1
        try:
            yield caller
        finally:
            self._under_way[user] -= 1
            if not self._under_way[user]:
                del self._under_way[user]


class _Span:
    """Around one call: measures and logs it, and turns what is raised into a status."""

    def __init__(self, method: str, context: ServicerContext, *, streaming: bool) -> None:
        self._method = method
        self._context = context
        self._streaming = streaming
        self._start = 0.0

    async def __aenter__(self) -> None:
        self._start = time.monotonic()

    async def __aexit__(self, kind: object, raised: BaseException | None, trace: object) -> None:
        error = _single(raised)
        code = grpc.StatusCode.OK
        if isinstance(error, _PEER_GONE):
            code = grpc.StatusCode.CANCELLED
        elif isinstance(error, grpc.aio.AbortError):
            code = self._context.code()
        elif error is not None:
            error = self._translate(error)
            code = error.code
        seconds = time.monotonic() - self._start
        telemetry.RPC_COUNT.labels(self._method, code.name).inc()
        telemetry.RPC_SECONDS.labels(self._method).observe(seconds)
        event = "stream_closed" if self._streaming else "rpc_served"
        telemetry.logger().info(event, method=self._method, code=code.name, duration_ms=round(seconds * 1e3, 3))
        if isinstance(error, MainspringError):
            await self._context.abort_with_status(rpc_status.to_status(to_status(error)))

    def _translate(self, error: BaseException) -> MainspringError:
        if isinstance(error, MainspringError):
            return error
        if isinstance(error, NotImplementedError):
            return MainspringError(
                Reason.NOT_IMPLEMENTED,
                f"{self._method} is part of the contract but not of this release: see the changelog for when it comes.",
                method=self._method,
            )
        request_id = new_id()
        telemetry.logger().error("rpc_failed", method=self._method, request_id=request_id, exc_info=error)
        return MainspringError(
            Reason.INTERNAL,
            f"A fault of ours, logged under the request id {request_id}: report it with that id.",
            request_id=request_id,
        )


def bearer_token(metadata: Mapping[str, str | bytes]) -> str:
    """The token of `authorization: Bearer …`; TOKEN_MISSING when there is none."""
    value = metadata.get("authorization", "")
    scheme, _, token = value.partition(" ") if isinstance(value, str) else ("", "", "")
    if scheme.lower() != "bearer" or not token:
        raise MainspringError(
            Reason.TOKEN_MISSING, "There is no bearer token: send `authorization: Bearer <token>` with the call."
        )
    return token.strip()


def _reader(decode: Any) -> _Read:
    """Decodes requests within the call, so that bytes that are no message are refused as any other fault of theirs."""

    def read(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            raise MainspringError(Reason.REQUEST_INVALID, f"The request is no message: {error}.", field="") from error

    return read


def validate(message: Message) -> None:
    """Checks a message against the rules of its contract; REQUEST_INVALID with one violation per fault."""
    found = protovalidate.collect_violations(message)
    if not found:
        return
    violations = [Violation(_path(violation.proto.field), violation.proto.message or "") for violation in found]
    first = violations[0]
    raise MainspringError(
        Reason.REQUEST_INVALID,
        f"The request breaks its rules: {first.field or 'message'}: {first.description}.",
        violations=violations,
        field=first.field,
    )


def _path(field: Any) -> str:
    """A FieldPath as dotted text. Any: the type belongs to protovalidate's own runtime."""
    return ".".join(element.field_name for element in field.elements) if field is not None else ""


def _decode_context(value: str | bytes) -> UserExecutionContext:
    try:
        message = identity_pb2.UserExecutionContext.FromString(value if isinstance(value, bytes) else value.encode())
    except DecodeError as error:
        raise MainspringError(
            Reason.CONTEXT_INVALID, f"{CONTEXT_KEY} is not a UserExecutionContext.", field=CONTEXT_KEY, value=""
        ) from error
    return UserExecutionContext.from_message(message)


def trace_id_of(metadata: Mapping[str, str | bytes]) -> str:
    """The trace id of a W3C traceparent; a new one where there is none."""
    parts = str(metadata.get("traceparent", "")).split("-")
    if len(parts) == 4 and len(parts[1]) == 32 and all(sign in "0123456789abcdef" for sign in parts[1]):
        return parts[1]
    return new_id().replace("-", "")


def _single(raised: BaseException | None) -> BaseException | None:
    """The one cause of a task group's failure, so that an error raised in a child is answered as itself."""
    while isinstance(raised, BaseExceptionGroup):
        ours = raised.subgroup(MainspringError)
        raised = (ours or raised).exceptions[0]
    return raised
