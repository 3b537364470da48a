"""An attacker with a tenant, a token and a service's credential, who sends bytes to any rpc and judges the answers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2, error_details_pb2, status_pb2
from mainspring.v1 import types_pb2
from mainspring_kit.identity import CONTEXT_KEY

from test_framework.agents import echo_agent, scripted_agent, step
from test_framework.grpc_testing import error_of
from test_framework.identities import Metadata, UserExecutionContext, make_context
from test_framework.stack import Stack
from test_framework.user import User
from tests.contract.matrix_calls import Rpc

CALL_SECONDS = 20.0
# For streams that end only with their clients.
FIRST_ANSWER_SECONDS = 0.5
SILENT_SECONDS = 0.05
RUNS_UNDER_WAY = 12
SHOWN_BYTES = 300
FAULTS = {code_pb2.INTERNAL, code_pb2.UNKNOWN}
# A text that is no UTF-8, and a depth that is none.
BROKEN_CONTEXT = b"\x0a\x05\xff\xfe\xfd\xfc\xfb\x38\xff\xff\xff\xff\x7f"
# How a call may say who makes it.
CREDENTIALS = (*["right"] * 10, "viewer", "service", "broken context", "broken", "none")
FAULT_NAMES = {code_pb2.Code.Name(code) for code in FAULTS}


@dataclass(frozen=True)
class Call:
    """What is sent, shown in short."""

    rpc: Rpc
    frames: Sequence[bytes]
    credential: str

    def __repr__(self) -> str:
        frames = ", ".join(f"{len(frame)} bytes: {frame[:SHOWN_BYTES]!r}" for frame in self.frames)
        return f"{self.rpc} as {self.credential}: {frames}"


class Attacker:
    """One user, and a process that holds the services' secret. `answered` counts the calls that were, by name.

    Its client is not grpc.aio's: that one forgets the status of a stream that ends while it writes (grpc/grpc#36066).
    """

    def __init__(self, stack: Stack, context: UserExecutionContext, *, run_ids: Sequence[str]) -> None:
        self.context = context
        self.run_ids = run_ids
        self.answered: Counter[str] = Counter()
        self.streams: Counter[str] = Counter()
        self._identities = stack.identities
        self._channels = {name: grpc.insecure_channel(addresses[0]) for name, addresses in stack.services.items()}

    @classmethod
    async def begin(cls, stack: Stack) -> Attacker:
        """An attacker with agents, a finished run, and runs under way, each good for one cancel."""
        context = make_context()
        async with User(stack, context) as user:
            await user.register(echo_agent(), scripted_agent("slow", step("I take my time.", delay="300s", result=1)))
            async with user.stream() as socket:
                events = await socket.run("echo", {"value": 1}, session_id=context.session_id)
                run_ids = [events[0]["run_id"]]
                for _ in range(RUNS_UNDER_WAY):
                    run_ids.append(await socket.start("slow", {}))
        return cls(stack, context, run_ids=run_ids)

    def close(self) -> None:
        """Closes its channels."""
        for channel in self._channels.values():
            channel.close()

    def metadata(self, rpc: Rpc, credential: str) -> Metadata:
        """The metadata of a call. A service without a context may register tools for everybody: that is its right."""
        identities = self._identities
        if credential == "none":
            return ()
        if credential == "broken":
            return (("authorization", "Bearer e30.e30.e30"),)
        if credential == "broken context":
            return (*identities.service_metadata(), (CONTEXT_KEY, BROKEN_CONTEXT))
        if credential == "service" or rpc.role == "service":
            return identities.service_metadata(self.context)
        role = rpc.role if credential == "right" else credential
        return identities.metadata(self.context.tenant_id, self.context.user_id, role)

    def send(self, call: Call) -> list[str]:
        """Sends the frames, on one stream or in one call; returns what is wrong with the answers."""
        rpc = call.rpc
        is_users = call.credential in ("right", "viewer") and rpc.role != "service"
        faults: list[str] = []
        answers = 0
        try:
            for answer in self._answers(rpc, call.frames, self.metadata(rpc, call.credential)):
                answers += 1
                faults.extend(self._faults(answer, is_users=is_users))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                faults.extend(self._faults_of_refusal(error))
        if answers:
            self.answered[rpc.name] += 1
            self.streams[rpc.path] += rpc.is_stream
        return faults

    def _answers(self, rpc: Rpc, frames: Sequence[bytes], metadata: Metadata) -> Iterator[Message]:
        channel: Any = self._channels[rpc.service.lower()]  # Any: its types know no bytes sent as they are
        method = rpc.method
        read = GetMessageClass(method.output_type).FromString
        options: dict[str, Any] = {"metadata": metadata, "timeout": CALL_SECONDS}  # Any: of keywords
        if not rpc.is_stream:
            yield channel.unary_unary(rpc.path, None, read)(frames[0], **options)
            return
        if method.client_streaming:
            call = channel.stream_stream(rpc.path, None, read)(iter(frames), **options)
        else:
            call = channel.unary_stream(rpc.path, None, read)(frames[0], **options)
        silence = _later(FIRST_ANSWER_SECONDS, call.cancel)
        try:
            for answer in call:
                silence.cancel()
                silence = _later(SILENT_SECONDS, call.cancel)
                yield answer
        finally:
            silence.cancel()
            call.cancel()

    def _faults_of_refusal(self, error: grpc.RpcError) -> list[str]:
        try:
            code, reason, _ = error_of(error)
        except AssertionError as failed:
            return [str(failed)]
        return [f"{reason}: {error.details()}"] if code.value[0] in FAULTS or not reason else []

    def _faults(self, answer: Message, *, is_users: bool) -> Iterator[str]:
        if is_users and b"bystander" in answer.SerializeToString():
            yield f"somebody else's: {answer}"
        for message in _walk(answer):
            if isinstance(message, status_pb2.Status) and message.code:
                infos = [detail for detail in message.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
                if message.code in FAULTS or len(infos) != 1:
                    yield f"a status without code or reason: {message}"
            if isinstance(message, types_pb2.RunError) and (not message.reason or message.code in FAULT_NAMES):
                yield f"an error without code or reason: {message}"


def _later(seconds: float, call: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.start()
    return timer


def _walk(message: Message) -> Iterator[Message]:
    yield message
    for each, value in message.ListFields():
        if each.message_type is None:
            continue
        if each.message_type.GetOptions().map_entry:
            continue
        for part in value if each.is_repeated else [value]:
            yield from _walk(part)


def words_of(attacker: Attacker, foreign: Mapping[str, str]) -> dict[str, Sequence[Any]]:
    """The words that make requests right, by field; Any: what the field holds. `foreign` is the bystander's."""
    context = attacker.context
    return {
        "run_id": [*attacker.run_ids, attacker.run_ids[0].upper(), foreign["run_id"]],
        "tenant_id": [context.tenant_id],
        "user_id": [context.user_id],
        "session_id": [context.session_id, "another"],
        "agent": ["echo", "echo", "slow", "nobody"],
        "name": ["echo", "diagnostics.echo", "text.join"],
        "tool": ["diagnostics.echo", "diagnostics.fail", "nothing.here"],
        "version": ["", "1", "2", "0", "99999999999999999999"],
        "alias": ["", "stable", "canary"],
        "agent_version": ["1"],
        "depth": [0, 1, 10, 11],
        "expected_seq": [0, 1, 5],
        "epoch": [0, 1],
        "item_id": [1, 1, 2, 3],
        "subscription_id": [1, 2, 3],
        "page_size": [0, 1, 500],
        "executor_id": ["attacker-1", "attacker-2"],
        "follower_id": ["attacker"],
        "worker_id": ["attacker-worker"],
        "roles": ["runner", "service"],
        "credit": [1, 10],
        "concurrency": [1, 4],
        "append_id": ["01a20f61-31f6-7254-a0c7-b29527f68656"],
        "request_id": ["01a20f61-31f6-7254-a0c7-b29527f68657", "", "r"],
        "document": DOCUMENTS,
        "seconds": [0],
        "nanos": [50_000_000],
        "input_schema": [b'{"type":"object"}'],
        "shared": [False],
        "effect": [types_pb2.EFFECT_CLASS_PURE],
    }


DOCUMENTS = (
    b'{"apiVersion":"mainspring/v1","kind":"Agent","name":"made","model":{"provider":"scripted","script":[]}}',
    b"apiVersion: mainspring/v1\nkind: Agent\nname: made\nmodel: {provider: scripted, script: [{result: {}}]}\n",
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\ne: [*d, *d]\n",
    b"a: &a {<<: *a}\n",
    b"!!python/object/apply:os.system ['true']\n",
    b"- " * 2_000,
    b"{" * 2_000,
    b"\xff\xfe\x00",
    b"a: 2026-13-45T99:99:99Z\n",
    b"? [1, 2]\n: 3\n",
    b"a: 1\na: 2\n",
    b"%YAML 9.9\n---\n...\n---\n",
)
