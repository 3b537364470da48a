"""What the running services say of themselves is what protos/ says, which `make check` holds against the baseline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from mainspring.v1 import events_pb2, state_pb2
from mainspring_kit.identity import new_id

from test_framework.grpc_testing import stub_class
from tests.contract.matrix_calls import RPCS, World, rpc_named
from tests.contract.state_calls import executing, reason_of, thinking
from tests.tidy.source import ROOT

pytestmark = [pytest.mark.contract, pytest.mark.real_services]

BUF = Path(sys.executable).parent / "buf"
BUF_SECONDS = 60
# Of the event's own place: a field that no release knows, number 19,000, with the bytes "new".
UNKNOWN_FIELD = b"\xc2\xa3\x09\x03new"


def buf(*arguments: str) -> None:
    """Runs buf in the root of the repository."""
    done = subprocess.run([BUF, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=BUF_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def plain(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """Without what compilers add or leave out: comments, JSON names, and what buf notes of a file."""
    copy = descriptor_pb2.FileDescriptorProto.FromString(file.SerializeToString())
    copy.ClearField("source_code_info")
    copy.DiscardUnknownFields()
    messages = [*copy.message_type, *(nested for message in copy.message_type for nested in message.nested_type)]
    for field in [field for message in messages for field in message.field] + list(copy.extension):
        field.ClearField("json_name")
    return copy


@pytest.fixture(scope="module")
def reflected(world: World) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The files that the four services tell, with everything that they import."""
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    for service in sorted({rpc.service for rpc in RPCS}):
        with grpc.insecure_channel(world.wire.stack.services[service.lower()][0]) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert f"mainspring.v1.{service}Service" in database.get_services()
            wanted = [database.FindFileContainingSymbol(f"mainspring.v1.{service}Service").name]
            while wanted:
                file = database.FindFileByName(wanted.pop())
                assert plain(files.setdefault(file.name, file)) == plain(file), f"{file.name} differs by service"
                wanted.extend(set(file.dependency) - set(files))
    return files


def test_the_services_tell_what_the_contracts_say(
    reflected: dict[str, descriptor_pb2.FileDescriptorProto], tmp_path: Path
) -> None:
    image = tmp_path / "contracts.binpb"
    buf("build", "--path", "protos/mainspring", "--output", str(image))
    written = {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file}
    ours = {name for name in written if name.startswith("mainspring/v1/")}
    # Errors travel as google.rpc.Status: no rpc names them, so no service needs to tell them.
    assert ours - {"mainspring/v1/errors.proto"} == {name for name in reflected if name.startswith("mainspring/")}
    assert [name for name in ours & set(reflected) if plain(written[name]) != plain(reflected[name])] == []


async def test_the_log_keeps_what_a_later_release_adds_to_an_event(world: World) -> None:
    """Executors may be newer than state: what they say of an event comes back whole, from the log and live."""
    state = world.wire.stack.services["state"][0]
    event = events_pb2.RunEvent.FromString(thinking().SerializeToString() + UNKNOWN_FIELD)
    async with (
        grpc.aio.insecure_channel(state) as channel,
        executing(stub_class("State")(channel), world.wire.identities) as executor,
    ):
        run_id = await executor.start(world.user, session_id=new_id())
        answer = await executor.send_one(executor.append(world.user, run_id, event, after=1))
        assert reason_of(answer.status) == ""
    read, follow = rpc_named("ReadEvents"), rpc_named("Follow")
    page = world.wire.answer(read, state_pb2.ReadEventsRequest(run_id=run_id), world.metadata(read))
    wanted = state_pb2.FollowRequest(subscribe=[state_pb2.Subscribe(subscription_id=1, run_id=run_id, after_seq=1)])
    call = world.wire.open(follow, [wanted], world.metadata(follow))
    live = next(delivery for frame in call for delivery in frame.deliveries if delivery.events).events
    call.cancel()
    for events in (page.events[1:], live):
        assert [found.seq for found in events] == [2]
        assert events[0].SerializeToString().endswith(UNKNOWN_FIELD)
