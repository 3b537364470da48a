"""Page tokens of runs and sessions."""

from __future__ import annotations

import base64

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError
from mainspring_state.core import pages

from tests.unit.state.samples import RUN

pytestmark = pytest.mark.unit


@given(st.text(min_size=1, max_size=128).filter(lambda text: "\ud800" not in text), st.integers(0, 2**52))
def test_a_sessions_token_survives_the_trip(session_id: str, microseconds: int) -> None:
    create_time = Timestamp()
    create_time.FromMicroseconds(microseconds)
    token = pages.session_token(types_pb2.Session(session_id=session_id, create_time=create_time))
    assert pages.read_session_token(token) == (microseconds, session_id)


def test_a_runs_token_is_empty_or_a_run() -> None:
    assert pages.read_run_token("") == ""
    assert pages.read_run_token(RUN) == RUN


@pytest.mark.parametrize("token", ["x", "é", "Zm9v", "=", RUN[:-1]])
def test_a_foreign_token_is_refused(token: str) -> None:
    for read in (pages.read_run_token, pages.read_session_token):
        with pytest.raises(MainspringError) as raised:
            read(token)
        assert raised.value.reason_name == "REQUEST_INVALID"


@pytest.mark.parametrize("text", ["9" * 30 + ":s", "-" + "9" * 18 + ":s", "-1:s"])
def test_a_forged_position_that_no_session_can_have_is_refused(text: str) -> None:
    with pytest.raises(MainspringError, match="page token"):
        pages.read_session_token(base64.urlsafe_b64encode(text.encode()).decode())
