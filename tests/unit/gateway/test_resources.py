"""Runs, sessions, agents and tools as JSON objects."""

import orjson
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import registry_pb2, state_pb2, types_pb2
from mainspring_gateway.core import resources

pytestmark = pytest.mark.unit

TIME = Timestamp(seconds=1_795_489_572, nanos=123_000_000)
TIME_TEXT = "2026-11-24T03:06:12.123Z"


def test_a_run_that_has_ended_tells_everything() -> None:
    run = types_pb2.Run(
        run_id="r",
        tenant_id="acme",
        user_id="ann",
        session_id="s",
        ordinal=2,
        agent="a",
        agent_version="1",
        state=types_pb2.RUN_STATE_COMPLETED,
        last_seq=5,
        input=b'{"x":1}',
        result=b'{"y":2}',
        create_time=TIME,
        start_time=TIME,
        end_time=TIME,
        stages=[types_pb2.Stage(name="completion", duration_ms=1)],
        usage=types_pb2.Usage(input_tokens=1),
        trace_id="t",
        epoch=1,
    )
    page = state_pb2.ListRunsResponse(runs=[run], next_page_token="n")
    assert orjson.loads(resources.runs_page(page)) == {
        "runs": [
            {
                "run_id": "r",
                "user_id": "ann",
                "session_id": "s",
                "ordinal": 2,
                "agent": "a",
                "agent_version": "1",
                "state": "COMPLETED",
                "last_seq": 5,
                "input": {"x": 1},
                "result": {"y": 2},
                "create_time": TIME_TEXT,
                "start_time": TIME_TEXT,
                "end_time": TIME_TEXT,
                "stages": [{"name": "completion", "duration_ms": 1.0}],
                "usage": {"input_tokens": 1, "output_tokens": 0, "cost_usd": 0.0},
                "trace_id": "t",
                "root_run_id": "r",
            }
        ],
        "next_page_token": "n",
    }


def test_a_run_that_waits_leaves_out_what_is_not_known() -> None:
    data = resources.run_data(types_pb2.Run(run_id="r", state=types_pb2.RUN_STATE_QUEUED, input=b"{}"))
    assert data["state"] == "QUEUED"
    assert not {"result", "error", "usage", "stages", "start_time", "end_time", "parent_run_id"} & set(data)


def test_a_run_that_failed_has_its_error() -> None:
    error = types_pb2.RunError(code="UNAVAILABLE", reason="TOOL_FAILED", message="no", metadata={"tool": "t"})
    data = resources.run_data(types_pb2.Run(run_id="r", state=types_pb2.RUN_STATE_FAILED, error=error))
    assert data["error"] == {"code": "UNAVAILABLE", "reason": "TOOL_FAILED", "message": "no", "metadata": {"tool": "t"}}


def test_sessions_agents_and_tools() -> None:
    session = types_pb2.Session(session_id="s", policy=types_pb2.SESSION_POLICY_ENQUEUE, run_count=3)
    sessions = orjson.loads(resources.sessions_page(state_pb2.ListSessionsResponse(sessions=[session])))["sessions"]
    assert (sessions[0]["session_id"], sessions[0]["policy"], sessions[0]["run_count"]) == ("s", "enqueue", 3)
    agent = types_pb2.Agent(name="a", version="1", labels={"k": "v"}, capabilities=["c"], spec=b'{"kind":"Agent"}')
    agents = orjson.loads(resources.agents_page(registry_pb2.ListAgentsResponse(agents=[agent])))["agents"]
    assert (agents[0]["spec"], agents[0]["labels"], agents[0]["capabilities"]) == ({"kind": "Agent"}, {"k": "v"}, ["c"])
    tool = types_pb2.Tool(name="t", effect=types_pb2.EFFECT_CLASS_PURE, input_schema=b"{}", timeout=Duration(seconds=2))
    tools = orjson.loads(resources.tools_page(registry_pb2.ListToolsResponse(tools=[tool])))["tools"]
    assert (tools[0]["effect"], tools[0]["timeout_seconds"], tools[0]["shared"]) == ("pure", 2.0, False)
