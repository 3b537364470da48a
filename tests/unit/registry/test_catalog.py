"""Reading the catalog: names, versions, page tokens, and where a watcher begins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring.v1 import registry_pb2 as pb
from mainspring_kit.errors import MainspringError
from mainspring_registry.core import catalog

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ["Lookup", "-a", "a b", "a\x00", "a\n", "é", "a" * 64, "../a"])
def test_a_name_that_cannot_exist_is_not_found(name: str) -> None:
    with pytest.raises(MainspringError) as raised:
        catalog.read_name(name)
    assert raised.value.reason_name == "AGENT_NOT_FOUND"
    assert raised.value.metadata == {"agent": name[:63]}


@pytest.mark.parametrize("version", ["0", "01", "-1", "1.0", "stable", "١", "1" * 10, " 1"])
def test_a_version_that_cannot_exist_is_not_found(version: str) -> None:
    with pytest.raises(MainspringError) as raised:
        catalog.read_version("lookup", version)
    assert raised.value.reason_name == "VERSION_NOT_FOUND"
    assert raised.value.metadata == {"agent": "lookup", "version": version}


@pytest.mark.parametrize(
    ("alias", "version", "expected"),
    [("", "", 0), ("stable", "", 0), ("", "3", 3), ("stable", "3", 3), ("canary", "12", 12)],
)
def test_a_version_wins_over_the_alias_and_stable_is_the_newest(alias: str, version: str, expected: int) -> None:
    request = pb.ResolveAgentRequest(name="lookup", alias=alias, version=version)
    assert catalog.resolve_version(request) == expected


def test_another_alias_is_not_found() -> None:
    with pytest.raises(MainspringError) as raised:
        catalog.resolve_version(pb.ResolveAgentRequest(name="lookup", alias="canary"))
    assert raised.value.metadata == {"agent": "lookup", "version": "canary"}


@given(st.from_regex(r"[a-z][a-z0-9._-]{0,127}", fullmatch=True))
def test_a_token_holds_the_last_name_of_its_page(name: str) -> None:
    token = catalog.write_token(name)
    assert len(token) <= 256
    assert catalog.read_token(token) == name


def test_no_token_is_before_the_first() -> None:
    assert catalog.read_token("") == ""
    assert catalog.read_version_token("") > catalog.VERSION_MAX
    assert catalog.read_version_token(catalog.write_token("7")) == 7


@pytest.mark.parametrize("token", ["!", "a", "é", "_w", catalog.write_token("a\x00")])
def test_a_malformed_token_is_refused(token: str) -> None:
    with pytest.raises(MainspringError) as raised:
        catalog.read_token(token)
    assert raised.value.reason_name == "REQUEST_INVALID"
    assert raised.value.violations[0].field == "page_token"


@pytest.mark.parametrize("last", ["name", "0", "1e3"])
def test_a_token_of_another_list_is_refused(last: str) -> None:
    with pytest.raises(MainspringError, match="page_token"):
        catalog.read_version_token(catalog.write_token(last))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ListAgentsRequest(text="\x00"), "text"),
        (pb.ListAgentsRequest(capability="a\x00"), "capability"),
        (pb.ListAgentsRequest(labels={"team": "\x00"}), "labels.team"),
        (pb.ListAgentsRequest(labels={"\x00": ""}), "labels.\x00"),
    ],
)
def test_filters_that_no_text_could_match_are_refused(request_: pb.ListAgentsRequest, field: str) -> None:
    with pytest.raises(MainspringError) as raised:
        catalog.read_filters(request_)
    assert raised.value.violations[0].field == field


@pytest.mark.parametrize(("after", "expected"), [(0, 0), (6, 6), (7, 7), (8, 0)])
def test_a_watcher_of_another_database_begins_anew(after: int, expected: int) -> None:
    assert catalog.begin_watch(after, 7) == expected
