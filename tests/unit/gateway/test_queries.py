"""Parameters of URLs are read exactly."""

from collections.abc import Callable

import pytest
from mainspring.v1 import registry_pb2, state_pb2, types_pb2
from mainspring_gateway.core import queries
from mainspring_kit.errors import MainspringError

pytestmark = pytest.mark.unit


def test_all_questions_about_runs() -> None:
    query = {
        "page_size": ["20"],
        "page_token": ["t"],
        "session_id": ["s"],
        "agent": ["a"],
        "state": ["RUNNING", "failed"],
    }
    assert queries.list_runs_request(query) == state_pb2.ListRunsRequest(
        page_size=20,
        page_token="t",
        session_id="s",
        agent="a",
        states=[types_pb2.RUN_STATE_RUNNING, types_pb2.RUN_STATE_FAILED],
    )
    assert queries.list_runs_request({}) == state_pb2.ListRunsRequest()


def test_all_questions_about_agents() -> None:
    query = {
        "capability": ["c"],
        "text": ["x"],
        "label": ["team:demo", "a:b:c"],
        "page_size": ["1"],
        "page_token": ["t"],
    }
    assert queries.list_agents_request(query) == registry_pb2.ListAgentsRequest(
        capability="c", text="x", labels={"team": "demo", "a": "b:c"}, page_size=1, page_token="t"
    )


def test_ranges_waits_and_versions() -> None:
    assert queries.read_events_range({"after_seq": ["7"], "page_size": ["1000"]}) == (7, 1_000)
    assert queries.read_events_range({}) == (0, 0)
    assert queries.wait_seconds({"wait": ["30"]}) == 30
    assert queries.wait_seconds({}) == 0
    assert queries.agent_version({"version": ["2"]}) == "2"


@pytest.mark.parametrize(
    ("read", "query", "field"),
    [
        (queries.list_runs_request, {"page_size": ["x"]}, "page_size"),
        (queries.list_runs_request, {"page_size": ["-1"]}, "page_size"),
        (queries.list_runs_request, {"page_size": ["501"]}, "page_size"),
        (queries.list_runs_request, {"page_size": ["1", "2"]}, "page_size"),
        (queries.list_runs_request, {"state": ["DONE"]}, "state"),
        (queries.list_runs_request, {"user_id": ["somebody-else"]}, "user_id"),
        (queries.list_agents_request, {"label": ["team"]}, "label"),
        (queries.read_events_range, {"after_seq": ["1.5"]}, "after_seq"),
        (queries.read_events_range, {"after_seq": ["9" * 30]}, "after_seq"),
        (queries.read_events_range, {"after_seq": ["²"]}, "after_seq"),
        (queries.wait_seconds, {"wait": ["301"]}, "wait"),
        (queries.wait_seconds, {"wait": ["soon"]}, "wait"),
        (queries.list_sessions_request, {"agent": ["a"]}, "agent"),
        (queries.list_tools_request, {"page_size": ["501"]}, "page_size"),
    ],
)
def test_what_is_wrong_is_named(
    read: Callable[[queries.Query], object], query: dict[str, list[str]], field: str
) -> None:
    with pytest.raises(MainspringError) as raised:
        read(query)
    assert (raised.value.reason_name, raised.value.metadata["field"]) == ("REQUEST_INVALID", field)
