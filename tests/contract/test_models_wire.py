"""The real providers' SDKs against a server that speaks their wires: answers, calls, and everything that goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import orjson
import pytest
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.plan import read_plan
from mainspring_execution.core.thought import Thought, Turn
from mainspring_execution.models import Model, make_model
from mainspring_execution.models.clients import Clients
from mainspring_execution.models.conversing import Shop
from mainspring_execution.models.credentials import Credentials
from mainspring_execution.models.endpoint import Endpoint
from mainspring_execution.models.prices import load_prices
from mainspring_kit.errors import MainspringError

from test_framework.model_server import FRAMES, ModelServer, Reply, anthropic_frames, model_server

pytestmark = pytest.mark.contract

KEY = "sk-the-key-that-nobody-may-see"
RUN_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
ECHO = types_pb2.Tool(
    name="diagnostics.echo", description="Gives back what it gets.", input_schema=b'{"type":"object"}'
)
NAMES = {"openai": "gpt-4o-mini", "anthropic": "claude-haiku-4-5"}
ENDPOINT = Endpoint("openai", "m", "http://127.0.0.1:9", "", None, None, False, {})
STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "PERMISSION_DENIED",
    403: "PERMISSION_DENIED",
    404: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    307: "INVALID_ARGUMENT",
    500: "UNAVAILABLE",
    503: "UNAVAILABLE",
    529: "UNAVAILABLE",
}
# Any: JSON values of specifications and requests.


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    async with model_server() as running:
        yield running


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    environment = {"OPENAI_API_KEY": KEY, "ANTHROPIC_API_KEY": KEY}
    opened = Shop(Clients(), Credentials(None, environment), load_prices(None), {"*"})
    yield opened
    await opened.aclose()


@pytest.fixture(params=["openai", "anthropic"])
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(provider: str, server: ModelServer, shop: Shop) -> Model:
    return made(provider, server, shop)


def made(provider: str, server: ModelServer, shop: Shop, **changes: Any) -> Model:
    output_schema = changes.pop("output_schema", None)
    described = {"provider": provider, "name": NAMES[provider], "base_url": server.base_url(provider), **changes}
    spec = {"model": described, "instructions": "Be brief.", "tools": ["diagnostics.echo"]}
    if output_schema is not None:
        spec["output_schema"] = output_schema
    return make_model(read_plan(types_pb2.Agent(name="a", version="1", spec=orjson.dumps(spec))), shop)


def turn(**changes: Any) -> Turn:
    fields: dict[str, Any] = {
        "tenant_id": "acme",
        "user_id": "ann",
        "session_id": "talk-1",
        "run_id": RUN_ID,
        "step": 1,
        "attempt": 1,
        "input": b'{"text":"Hello?"}',
        "planned": (),
        "outcomes": {},
        "tools": [ECHO],
    }
    return Turn(**{**fields, **changes})


def unheard(_: str) -> None:
    """Nobody listens."""


async def failure(model: Model, asked: Turn | None = None) -> MainspringError:
    with pytest.raises(MainspringError) as raised:
        await model.think(asked or turn(), unheard)
    assert KEY not in str(raised.value) and KEY not in str(raised.value.metadata)
    return raised.value


def stepped(thought: Thought) -> dict[str, Any]:
    """The turn's fields after a step whose calls all gave 7."""
    planned = [
        events_pb2.PlannedCall(call_id=f"{RUN_ID}.2.{index}", tool=call.tool, arguments=call.arguments)
        for index, call in enumerate(thought.calls)
    ]
    thinking = events_pb2.AgentThinking(
        step=1,
        text=thought.text,
        model=thought.model,
        planned_calls=planned,
        provider_state=thought.provider_state,
    )
    outcomes = {
        call.call_id: events_pb2.ToolCompleted(call_id=call.call_id, status=types_pb2.TOOL_STATUS_OK, result=b"7")
        for call in planned
    }
    return {"step": 2, "planned": planned, "outcomes": outcomes, "thoughts": [thinking]}


async def test_text_comes_piece_by_piece_and_is_the_result(model: Model, provider: str, server: ModelServer) -> None:
    server.script(Reply(FRAMES[provider](["Hel", "lo ", "Ann."])))
    pieces: list[str] = []
    thought = await model.think(turn(), pieces.append)
    assert pieces == ["Hel", "lo ", "Ann."]
    assert (thought.text, thought.result, thought.calls) == ("Hello Ann.", b'"Hello Ann."', ())
    assert thought.model == f"{provider}/{NAMES[provider]}"
    assert (thought.usage.input_tokens, thought.usage.output_tokens) == (100, 10)
    assert thought.usage.cost_usd == pytest.approx(
        {"openai": 100 * 0.15e-6 + 10 * 0.60e-6, "anthropic": 100 * 1e-6 + 10 * 5e-6}[provider]
    )


async def test_what_is_sent_is_the_instructions_the_input_and_the_tools(
    model: Model, provider: str, server: ModelServer
) -> None:
    server.script(Reply(FRAMES[provider](["Hi."])))
    await model.think(turn(), unheard)
    [asked] = server.asked
    body = asked.body
    if provider == "openai":
        assert asked.path == "/v1/chat/completions"
        assert body["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello?"},
        ]
        assert body["tools"][0]["function"]["name"] == "diagnostics__echo"
        assert body["stream_options"] == {"include_usage": True}
    else:
        assert asked.path == "/v1/messages"
        assert (body["system"], body["messages"]) == ("Be brief.", [{"role": "user", "content": "Hello?"}])
        assert body["tools"][0]["name"] == "diagnostics__echo"
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["stream"]) == (NAMES[provider], True)


async def test_settings_go_over_the_wire_as_the_provider_names_them(
    provider: str, server: ModelServer, shop: Shop
) -> None:
    schema = {"type": "object", "required": ["answer"]}
    asked = {"temperature": 0.5, "max_tokens": 99, "structured": True, "options": {"seed": 7}}
    server.script(Reply(FRAMES[provider](['{"answer": 1}'])))
    await made(provider, server, shop, output_schema=schema, **asked).think(turn(), unheard)
    body = server.asked[0].body
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.5, 99, 7)
    told = {
        "openai": lambda: body["response_format"]["json_schema"]["schema"],
        "anthropic": lambda: body["output_config"]["format"]["schema"],
    }
    assert told[provider]() == schema


async def test_a_conversation_with_calls_is_taken_also_where_there_are_no_tools(
    provider: str, server: ModelServer, shop: Shop
) -> None:
    model = made(provider, server, shop)
    server.script(Reply(FRAMES[provider](["Look."], [("diagnostics__echo", "{}")])), Reply(FRAMES[provider](["Yes."])))
    thought = await model.think(turn(), unheard)
    await model.think(turn(**stepped(thought), tools=()), unheard)
    body = server.asked[-1].body
    if provider == "openai":
        assert "tools" not in body
    else:
        assert [tool["name"] for tool in body["tools"]] == ["diagnostics__echo"]
        assert body["tool_choice"] == {"type": "none"}


async def test_calls_that_a_server_tells_apart_by_their_ids_alone_are_told_apart(
    server: ModelServer, shop: Shop
) -> None:
    calls = [
        {"index": 0, "id": f"id-{number}", "function": {"name": "diagnostics__echo", "arguments": f'{{"n":{number}}}'}}
        for number in (1, 2)
    ]
    delta = [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None} for call in calls]
    ends = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    frames = [b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n" for choice in [*delta, *ends]]
    server.script(Reply(frames))
    thought = await made("openai", server, shop).think(turn(), unheard)
    assert [call.arguments for call in thought.calls] == [b'{"n":1}', b'{"n":2}']


async def test_calls_come_beside_each_other_and_their_results_go_back(
    model: Model, provider: str, server: ModelServer
) -> None:
    calls = [("diagnostics__echo", '{"value": 1}'), ("diagnostics__echo", '{"value": "zwei"}')]
    server.script(Reply(FRAMES[provider](["Both."], calls)), Reply(FRAMES[provider](["Done."])))
    thought = await model.think(turn(), unheard)
    assert [(call.tool, orjson.loads(call.arguments)) for call in thought.calls] == [
        ("diagnostics.echo", {"value": 1}),
        ("diagnostics.echo", {"value": "zwei"}),
    ]
    assert (thought.text, thought.result) == ("Both.", b"")
    await model.think(turn(**stepped(thought)), unheard)
    messages = server.asked[-1].body["messages"]
    if provider == "openai":
        _, _, asked, first, second = messages
        ids = [call["id"] for call in asked["tool_calls"]]
        assert [first["tool_call_id"], second["tool_call_id"]] == ids
        assert (first["role"], first["content"]) == ("tool", "7")
    else:
        _, asked, told = messages
        ids = [block["id"] for block in asked["content"] if block["type"] == "tool_use"]
        assert [block["tool_use_id"] for block in told["content"]] == ids
        assert told["content"][0]["content"] == "7"
    assert len(set(ids)) == 2


async def test_thinking_goes_back_as_it_came_with_its_signature(server: ModelServer, shop: Shop) -> None:
    model = made("anthropic", server, shop)
    calls = [("diagnostics__echo", '{"value": 1}')]
    server.script(Reply(anthropic_frames(["I look."], calls, thinking="Hm …")), Reply(anthropic_frames(["Done."])))
    thought = await model.think(turn(), unheard)
    assert thought.text == "I look."
    await model.think(turn(**stepped(thought)), unheard)
    _, asked, told = server.asked[-1].body["messages"]
    assert asked["content"][0] == {"type": "thinking", "thinking": "Hm …", "signature": "sig+/=="}
    assert asked["content"][2] == {
        "type": "tool_use",
        "id": "toolu_0x",
        "name": "diagnostics__echo",
        "input": {"value": 1},
    }
    assert told["content"][0]["tool_use_id"] == "toolu_0x"


async def test_a_status_becomes_its_code(model: Model, provider: str, server: ModelServer) -> None:
    body = orjson.dumps({"error": {"type": "some_error", "message": f"It is so with {KEY}"}})
    for status, code in STATUSES.items():
        server.asked.clear()
        server.script(Reply(status=status, body=body, headers={"location": f"{server.url}/elsewhere"}))
        error = await failure(model)
        assert (error.reason_name, error.code.name) == ("MODEL_FAILED", code), status
        assert (error.metadata["provider"], error.metadata["step"]) == (provider, "1")
        assert len(server.asked) == 1, "the SDK has asked again by itself"


async def test_a_limit_says_when_to_come_back(model: Model, server: ModelServer) -> None:
    for name, text, seconds in (
        ("retry-after", "7", "7"),
        ("retry-after-ms", "1500", "1.5"),
        ("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT", "0"),
        ("retry-after", "nonsense", None),
    ):
        server.script(Reply(status=429, body=b'{"error":{"message":"slow down"}}', headers={name: text}))
        error = await failure(model)
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.metadata.get("retry_after_seconds") == seconds
        assert "slow down" in error.message


async def test_a_stream_that_breaks_is_unavailable(model: Model, provider: str, server: ModelServer) -> None:
    frames = FRAMES[provider](["Hel"], ends=False)
    for end in ("cut", "short"):
        server.script(Reply(frames, end=end))
        assert (await failure(model)).code is grpc.StatusCode.UNAVAILABLE


async def test_nobody_at_the_address_is_unavailable(provider: str, server: ModelServer, shop: Shop) -> None:
    model = made(provider, server, shop, base_url="http://127.0.0.1:9")
    assert (await failure(model)).code is grpc.StatusCode.UNAVAILABLE


async def test_what_cannot_be_read_is_an_internal_fault(model: Model, server: ModelServer) -> None:
    for data in (b"{not json", b"[1]", b'"text"', b"\xff\xfe", b'{"choices": 7, "type": "message_start"}'):
        server.script(Reply([b"event: message_start\ndata: " + data + b"\n\n"]))
        error = await failure(model)
        assert (error.reason_name, error.code.name) == ("MODEL_FAILED", "INTERNAL"), data


async def test_an_error_in_the_stream_is_told_by_its_kind(model: Model, provider: str, server: ModelServer) -> None:
    error: dict[str, Any] = {"type": "error", "error": {"type": "rate_limit_error", "message": "too much"}}
    server.script(
        Reply([*FRAMES[provider](["Hel"], ends=False), b"event: error\ndata: " + orjson.dumps(error) + b"\n\n"])
    )
    assert (await failure(model)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    error["error"] = {"type": "overloaded_error", "message": "busy"}
    server.script(Reply([b"event: error\ndata: " + orjson.dumps(error) + b"\n\n"]))
    assert (await failure(model)).code is grpc.StatusCode.UNAVAILABLE


async def test_an_interrupted_step_leaves_the_provider(model: Model, provider: str, server: ModelServer) -> None:
    server.script(Reply(FRAMES[provider](["Hel"], ends=False), end="hang"))
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        thinking = tasks.create_task(model.think(turn(), unheard))
        await server.hung.wait()
        thinking.cancel()
        await server.gone.wait()


async def test_an_answer_that_was_cut_or_refused_is_no_result(model: Model, provider: str, server: ModelServer) -> None:
    cut, refused = {"openai": ("length", "content_filter"), "anthropic": ("max_tokens", "refusal")}[provider]
    for finish, word in ((cut, "max_tokens"), (refused, "refused")):
        server.script(Reply(FRAMES[provider](["Hel"], finish=finish)))
        error = await failure(model)
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert word in error.message


async def test_an_answer_that_does_not_fit_is_shown_to_its_model(
    provider: str, server: ModelServer, shop: Shop
) -> None:
    model = made(provider, server, shop, output_schema={"type": "object", "required": ["answer"]})
    server.script(Reply(FRAMES[provider](["It is 7."])), Reply(FRAMES[provider](['```json\n{"answer": 7}\n```'])))
    faulty = await model.think(turn(), unheard)
    error = faulty.fault
    assert error is not None and faulty.usage.output_tokens == 10
    assert (error.reason_name, error.metadata["answer"]) == ("RESULT_INVALID", "It is 7.")
    told = types_pb2.RunError(reason=error.reason_name, message=error.message, metadata=error.metadata)
    failed = events_pb2.AttemptFailed(step=1, attempt=1, error=told)
    thought = await model.think(turn(attempt=2, failures=[failed]), unheard)
    assert orjson.loads(thought.result) == {"answer": 7}
    messages = server.asked[-1].body["messages"]
    assert (messages[-2]["role"], messages[-2]["content"]) == ("assistant", "It is 7.")
    assert "was not taken" in messages[-1]["content"]
    assert '"required":["answer"]' in str(server.asked[-1].body).replace("'", '"').replace(": ", ":")


async def test_arguments_that_are_no_object_are_not_taken(model: Model, provider: str, server: ModelServer) -> None:
    server.script(Reply(FRAMES[provider](["Now."], [("diagnostics__echo", '{"value": ')])))
    fault = (await model.think(turn(), unheard)).fault
    assert fault is not None
    assert (fault.reason_name, fault.metadata["path"]) == ("RESULT_INVALID", "calls[0].arguments")


async def test_a_turn_may_ask_a_fallback(provider: str, server: ModelServer, shop: Shop) -> None:
    other = "anthropic" if provider == "openai" else "openai"
    fallback = {"provider": other, "name": "other-1", "base_url": server.base_url(other)}
    model = made(provider, server, shop, fallbacks=[fallback])
    server.script(Reply(FRAMES[other](["From the other."])))
    thought = await model.think(turn(fallback=1), unheard)
    assert (model.fallbacks, thought.model, thought.usage.cost_usd) == (1, f"{other}/other-1", 0.0)


async def test_what_came_from_the_cache_costs_less(provider: str, server: ModelServer, shop: Shop) -> None:
    told_by: dict[str, dict[str, Any]] = {
        "openai": {
            "prompt_tokens": 1_000,
            "completion_tokens": 10,
            "total_tokens": 1_010,
            "prompt_tokens_details": {"cached_tokens": 900},
        },
        "anthropic": {"input_tokens": 100, "cache_read_input_tokens": 800, "cache_creation_input_tokens": 100},
    }
    server.script(Reply(FRAMES[provider](["Hi."], usage=told_by[provider])))
    told = (await made(provider, server, shop).think(turn(), unheard)).usage
    assert (told.input_tokens, told.output_tokens) == (1_000, 10)
    expected = {
        "openai": 100 * 0.15 + 900 * 0.075 + 10 * 0.60,
        "anthropic": 100 * 1.0 + 800 * 0.10 + 100 * 1.25 + 10 * 5.0,
    }
    assert told.cost_usd == pytest.approx(expected[provider] / 1e6)


async def test_without_a_key_the_providers_own_address_is_not_asked(provider: str, server: ModelServer) -> None:
    poor = Shop(Clients(), Credentials(None, {}), load_prices(None), {"*"})
    error = await failure(made(provider, server, poor, base_url=""))
    assert (error.reason_name, error.metadata["credential"]) == ("CREDENTIAL_MISSING", provider)
    server.script(Reply(FRAMES[provider](["Hi."])))
    assert (await made(provider, server, poor).think(turn(), unheard)).text == "Hi."
    await poor.aclose()


async def test_clients_are_shared_and_the_one_not_used_for_longest_is_closed() -> None:
    clients = Clients(clients_max=2)
    first, second, third = (ENDPOINT, "key-1"), (ENDPOINT, "key-2"), (ENDPOINT, "key-3")
    async with clients.use(*first) as (busy, _):
        async with clients.use(*first) as (same, _):
            assert same is busy
        async with clients.use(*second) as (other, _), clients.use(*third):
            assert not busy.is_closed()  # it is dropped, and still used
            assert not other.is_closed()
    assert busy.is_closed()
    async with clients.use(*first) as (new, _):
        assert new is not busy
    assert other.is_closed()
    await clients.close()
    assert new.is_closed()
