"""Whole runs with real providers' SDKs over real HTTP: calls, retries, repairs, fallbacks, keys that nobody sees."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from mainspring.v1 import events_pb2, types_pb2

from test_framework.model_server import FRAMES, ModelServer, Reply, anthropic_frames, model_server, openai_frames
from tests.contract.execution_platform import Caller, names, terminal

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

KEY = "sk-a-key-that-only-its-provider-may-see"
COMPLETED, FAILED = types_pb2.RUN_STATE_COMPLETED, types_pb2.RUN_STATE_FAILED
NAMES = {"openai": "gpt-4o-mini", "anthropic": "claude-haiku-4-5"}
AT_ONCE = {"initial": "1ms", "max": "1ms"}
CLASSES = ("timeout", "unavailable", "exhausted")
ECHO = "diagnostics__echo"
# Any: JSON values of specifications.


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModelServer]:
    for provider in ("OPENAI", "ANTHROPIC"):
        monkeypatch.setenv(f"MAINSPRING_CREDENTIAL_{provider}", KEY)
    async with model_server() as running:
        yield running


@pytest.fixture(params=["openai", "anthropic"])
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def register(caller: Caller, server: ModelServer, provider: str, *, model: Any = None, **fields: Any) -> str:
    described = {"provider": provider, "name": NAMES[provider], "base_url": server.base_url(provider), **(model or {})}
    spec: dict[str, Any] = {
        "apiVersion": "mainspring/v1",
        "kind": "Agent",
        "name": f"{provider}-agent",
        "model": described,
        "instructions": "Be brief.",
        "tools": ["diagnostics.echo"],
        "errors": {name: {"backoff": AT_ONCE} for name in CLASSES},
        **fields,
    }
    return (await caller.register(spec)).name


def failures(events: list[events_pb2.RunEvent]) -> list[tuple[str, str]]:
    """Code and reason of each failed attempt."""
    failed = [event.attempt_failed.error for event in events if event.HasField("attempt_failed")]
    return [(error.code, error.reason) for error in failed]


async def test_a_run_calls_its_tools_at_once_and_ends_with_what_the_model_says(
    ann: Caller, server: ModelServer, provider: str
) -> None:
    agent = await register(ann, server, provider)
    calls = [(ECHO, '{"value": 1}'), (ECHO, '{"value": 2}')]
    server.script(Reply(FRAMES[provider](["Both."], calls)), Reply(FRAMES[provider](["One and ", "two."])))
    run = await ann.run(agent, "What are they?")
    assert (run.state, run.result) == (COMPLETED, b'"One and two."')
    events = await ann.log(run.run_id)
    assert names(events) == [
        "agent_started",
        "agent_thinking",
        *["tool_executing"] * 2,
        *["tool_completed"] * 2,
        "agent_thinking",
        "agent_completed",
    ]
    assert events[1].agent_thinking.model == f"{provider}/{NAMES[provider]}"
    assert (run.usage.input_tokens, run.usage.output_tokens) == (200, 20)
    assert run.usage.cost_usd > 0
    told = str(server.asked[-1].body)
    assert "value" in told and "What are they?" in told


async def test_what_passes_is_tried_again_and_every_attempt_is_in_the_log(
    ann: Caller, server: ModelServer, provider: str
) -> None:
    agent = await register(
        ann, server, provider, errors={name: {"attempts": 4, "backoff": AT_ONCE} for name in CLASSES}
    )
    server.script(
        Reply(status=500, body=b"{}"),
        Reply(FRAMES[provider](["Hel"], ends=False), end="cut"),
        Reply(status=429, body=b'{"error":{"message":"slow down"}}', headers={"retry-after-ms": "300"}),
        Reply(FRAMES[provider](["Hello."])),
    )
    run = await ann.run(agent)
    assert (run.state, run.result) == (COMPLETED, b'"Hello."')
    events = await ann.log(run.run_id)
    assert failures(events) == [
        ("UNAVAILABLE", "MODEL_FAILED"),
        ("UNAVAILABLE", "MODEL_FAILED"),
        ("RESOURCE_EXHAUSTED", "MODEL_FAILED"),
    ]
    limited = events[3]
    waited = limited.attempt_failed.retry_time.ToNanoseconds() - limited.event_time.ToNanoseconds()
    assert 0.1e9 < waited < 5e9


async def test_what_is_wrong_is_not_tried_again(ann: Caller, server: ModelServer, provider: str) -> None:
    agent = await register(ann, server, provider)
    for reply in (Reply(status=400, body=b"{}"), Reply(status=401, body=b"{}"), Reply([b"data: {nonsense\n\n"] * 2)):
        server.asked.clear()
        server.script(reply if provider == "openai" or reply.status != 200 else Reply([b"event: x\n", *reply.frames]))
        run = await ann.run(agent)
        assert (run.state, run.error.reason, len(server.asked)) == (FAILED, "MODEL_FAILED", 1)


async def test_a_result_that_does_not_fit_is_shown_to_the_model_until_it_does(
    ann: Caller, server: ModelServer, provider: str
) -> None:
    schema = {"type": "object", "required": ["answer"], "properties": {"answer": {"type": "integer"}}}
    agent = await register(ann, server, provider, output_schema=schema)
    wrong = [Reply(FRAMES[provider]([text])) for text in ("It is 7.", '{"answer": "7"}')]
    server.script(*wrong, Reply(FRAMES[provider](['{"answer": 7}'])))
    run = await ann.run(agent)
    assert (run.state, orjson.loads(run.result)) == (COMPLETED, {"answer": 7})
    assert failures(await ann.log(run.run_id)) == [("INVALID_ARGUMENT", "RESULT_INVALID")] * 2
    assert run.usage.output_tokens == 30
    said = server.asked[-1].body["messages"]
    assert [message["content"] for message in said if message["role"] == "assistant"] == ["It is 7.", '{"answer": "7"}']
    assert "$.answer" in said[-1]["content"] and "Register" not in said[-1]["content"]


async def test_a_model_that_cannot_mend_its_result_fails_the_run(
    ann: Caller, server: ModelServer, provider: str
) -> None:
    agent = await register(ann, server, provider, output_schema={"type": "object"})
    server.script(Reply(FRAMES[provider](["7"])))
    run = await ann.run(agent)
    assert (run.state, run.error.reason, len(server.asked)) == (FAILED, "RESULT_INVALID", 3)
    assert terminal(await ann.log(run.run_id)).usage.output_tokens == 30


async def test_a_fallback_answers_when_the_model_has_had_its_attempts_and_goes_on(
    ann: Caller, server: ModelServer
) -> None:
    fallback = {"provider": "anthropic", "name": "claude-haiku-4-5", "base_url": server.base_url("anthropic")}
    agent = await register(ann, server, "openai", model={"fallbacks": [fallback]})
    away = Reply(status=503, body=b"{}")
    calls = [(ECHO, '{"value": 1}')]
    server.script(away, away, away, Reply(anthropic_frames(["I look."], calls)), Reply(anthropic_frames(["Here."])))
    run = await ann.run(agent)
    assert (run.state, run.result) == (COMPLETED, b'"Here."')
    events = await ann.log(run.run_id)
    thoughts = [event.agent_thinking.model for event in events if event.HasField("agent_thinking")]
    assert thoughts == ["anthropic/claude-haiku-4-5"] * 2
    assert failures(events) == [("UNAVAILABLE", "MODEL_FAILED")] * 3
    assert [asked.path for asked in server.asked][-2:] == ["/v1/messages"] * 2


async def test_a_model_that_asks_for_a_long_rest_is_left_for_its_fallback_at_once(
    ann: Caller, server: ModelServer
) -> None:
    fallback = {"provider": "openai", "name": "other", "base_url": server.base_url("openai")}
    agent = await register(ann, server, "openai", model={"fallbacks": [fallback]})
    limited = Reply(status=429, body=b"{}", headers={"retry-after": "60"})
    server.script(limited, Reply(openai_frames(["Here."])))
    run = await ann.run(agent)
    assert (run.state, len(server.asked)) == (COMPLETED, 2)


async def test_a_slow_model_runs_out_of_its_time(ann: Caller, server: ModelServer, provider: str) -> None:
    agent = await register(ann, server, provider, model={"timeout": "300ms"}, errors={"timeout": {"attempts": 1}})
    server.script(Reply(FRAMES[provider](["Hel"], ends=False), end="hang"))
    run = await ann.run(agent)
    assert (run.state, run.error.code, run.error.reason) == (FAILED, "DEADLINE_EXCEEDED", "STEP_TIMED_OUT")


async def test_a_session_tells_its_model_what_was_said_before(ann: Caller, server: ModelServer, provider: str) -> None:
    agent = await register(ann, server, provider)
    session_id = f"talk-{provider}"
    for answer in ("I am well.", "Still so."):
        server.script(Reply(FRAMES[provider]([answer])))
        await ann.run(agent, "How are you?", session_id=session_id)
    said = [message["content"] for message in server.asked[-1].body["messages"] if message["role"] != "system"]
    asked = '{"value":"How are you?"}'
    assert said == [asked, "I am well.", asked]


async def test_what_execution_serves_itself_is_offered_with_its_schema(
    ann: Caller, server: ModelServer, provider: str
) -> None:
    agent = await register(ann, server, provider, tools=["run.sleep", "human.approve", "diagnostics.echo"])
    server.script(Reply(FRAMES[provider]([], [("run__sleep", '{"seconds": 0.01}')])), Reply(FRAMES[provider](["Up."])))
    run = await ann.run(agent)
    assert (run.state, run.result) == (COMPLETED, b'"Up."')
    offered = server.asked[0].body["tools"]
    found = {
        (tool.get("function") or tool)["name"]: tool["function"]["parameters"]
        if provider == "openai"
        else tool["input_schema"]
        for tool in offered
    }
    assert list(found) == ["diagnostics__echo", "human__approve", "run__sleep"]
    assert found["human__approve"]["required"] == ["title"]
    assert found["diagnostics__echo"]["type"] == "object"


async def test_a_key_is_in_no_event_no_log_line_and_no_specification(
    ann: Caller, server: ModelServer, provider: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    agent = await register(ann, server, provider)
    told = orjson.dumps({"error": {"type": "some_error", "message": f"the key {KEY} is not known"}})
    for reply in (Reply(status=400, body=told), Reply(status=401, body=told), Reply(FRAMES[provider](["Hi."]))):
        server.script(reply)
        run = await ann.run(agent)
        seen = [*map(str, await ann.log(run.run_id)), str(run), caplog.text]
        assert not [text for text in seen if KEY in text]
    assert all(KEY in asked.headers["authorization"] for asked in server.asked)


async def test_a_missing_key_is_told_by_its_name(ann: Caller, server: ModelServer, provider: str) -> None:
    agent = await register(ann, server, provider, model={"credential": "not-there"})
    run = await ann.run(agent)
    assert (run.error.code, run.error.reason) == ("FAILED_PRECONDITION", "CREDENTIAL_MISSING")
    assert run.error.metadata["credential"] == "not-there"
    assert not server.asked


async def test_a_model_sees_its_thinking_again_when_its_run_is_taken_up_from_the_log(
    ann: Caller, server: ModelServer
) -> None:
    agent = await register(ann, server, "anthropic", tools=["run.sleep"])
    calls = [("run__sleep", '{"seconds": 2.2}')]
    server.script(Reply(anthropic_frames(["A nap."], calls, thinking="Hm.")), Reply(anthropic_frames(["Up."])))
    run = await ann.run(agent)
    events = await ann.log(run.run_id)
    assert run.result == b'"Up."'
    assert "agent_waiting" in names(events)
    assert not any(event.agent_thinking.provider_state for event in events)
    _, said, told = server.asked[-1].body["messages"]
    assert said["content"][0] == {"type": "thinking", "thinking": "Hm.", "signature": "sig+/=="}
    assert told["content"][0]["tool_use_id"] == said["content"][2]["id"]


async def test_another_agent_with_another_provider_goes_on_with_what_was_said(
    ann: Caller, server: ModelServer, provider: str
) -> None:
    other = "anthropic" if provider == "openai" else "openai"
    await register(ann, server, other, name="second", instructions="You are the second.", tools=[])
    await register(ann, server, provider, name="first", handoffs=["second"])
    calls = [(ECHO, '{"value": 1}'), ("handoff__second", '{"reason": "enough"}')]
    steps = [Reply(FRAMES[provider](["Well."], [call])) for call in calls]
    server.script(*steps, Reply(FRAMES[other](["Here I am."])))
    run = await ann.run("first", "Go.")
    assert (run.state, run.result) == (COMPLETED, b'"Here I am."')
    body = server.asked[-1].body
    told = str(body)
    assert "You are the second." in told and "Be brief." not in told
    assert all(word in told for word in ('"value":"Go."', ECHO, "handoff__second", "enough"))
    thoughts = [event.agent_thinking.model for event in await ann.log(run.run_id) if event.HasField("agent_thinking")]
    assert [thought.split("/")[0] for thought in thoughts] == [provider, provider, other]
