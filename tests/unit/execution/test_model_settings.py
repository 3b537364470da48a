"""What stands around a provider: keys by name, prices, tools' names, and where a specification may send us."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from mainspring_execution.config import ExecutionSettings
from mainspring_execution.core.intrinsic import describe
from mainspring_execution.core.tool_names import WIRE_NAME_CHARACTERS_MAX, tool_named, wire_name
from mainspring_execution.models import make_model
from mainspring_execution.models.clients import Clients
from mainspring_execution.models.conversing import Shop
from mainspring_execution.models.credentials import Credentials
from mainspring_execution.models.prices import Prices, Tokens, load_prices, read_prices
from mainspring_kit.config import SettingsError
from mainspring_kit.errors import MainspringError

from tests.unit.execution.samples import plan

pytestmark = pytest.mark.unit


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_tenants_own_key_goes_before_the_shared_one_and_both_before_the_environment(tmp_path: Path) -> None:
    environment = {"MAINSPRING_CREDENTIAL_OPENAI": "named", "OPENAI_API_KEY": "usual"}
    credentials = Credentials(tmp_path, environment)
    assert credentials.find("openai", tenant_id="acme") == "named"
    put(tmp_path / "openai", " shared\n")
    assert credentials.find("openai", tenant_id="acme") == "shared"
    put(tmp_path / "acme" / "openai", "own\n")
    assert credentials.find("openai", tenant_id="acme") == "own"
    assert credentials.find("openai", tenant_id="other") == "shared"
    assert Credentials(None, {"OPENAI_API_KEY": "usual"}).find("openai", tenant_id="acme") == "usual"
    assert Credentials(None, {"MAINSPRING_CREDENTIAL_MY_KEY": "mine"}).find("my-key", tenant_id="acme") == "mine"
    assert Credentials(None, {"MY_KEY_API_KEY": "any"}).find("my-key", tenant_id="acme") == ""


@pytest.mark.parametrize("name", ["../acme/openai", "acme/openai", "..", ".", "", "/etc/passwd", "A", "a\0b", "a.b"])
def test_no_name_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    put(tmp_path / "acme" / "openai", "own")
    assert Credentials(tmp_path / "acme", {}).find(name, tenant_id="other") == ""


@pytest.mark.parametrize("tenant_id", ["..", ".", "", "../..", "a/b"])
def test_no_tenant_leads_out_of_the_folder(tmp_path: Path, tenant_id: str) -> None:
    put(tmp_path / "openai", "not for you")
    (tmp_path / "keys").mkdir()
    assert Credentials(tmp_path / "keys", {}).find("openai", tenant_id=tenant_id) == ""


def test_a_price_is_meant_for_a_model_and_its_dated_releases_only() -> None:
    prices = load_prices(None)
    known = prices.price("openai", "gpt-4o")
    assert known is not None and (known.input, known.output) == (2.5, 10.0)
    assert prices.price("openai", "gpt-4o-2024-08-06") == known
    assert prices.price("anthropic", "claude-haiku-4-5-20251001") == prices.price("anthropic", "claude-haiku-4-5")
    for model in ("gpt-4o-audio-preview", "gpt-4", "gpt-4o2", "llama-3"):
        assert prices.price("openai", model) is None
    assert prices.usage("openai", "llama-3", tokens=Tokens(1_000, 1_000)).cost_usd == 0


def test_an_operators_prices_add_to_the_platforms_and_go_before_them(tmp_path: Path) -> None:
    put(tmp_path / "own.toml", '[openai]\n"gpt-4o" = {input = 1, output = 2}\n"llama*" = {input = 0.1, output = 0.2}\n')
    prices = load_prices(tmp_path / "own.toml")
    assert prices.usage("openai", "gpt-4o", tokens=Tokens(1_000_000, 1_000_000)).cost_usd == pytest.approx(3.0)
    assert prices.usage("openai", "llama-3", tokens=Tokens(1_000_000, 0)).cost_usd == pytest.approx(0.1)
    assert prices.price("openai", "gpt-4o-mini") is not None


@pytest.mark.parametrize(
    "text", ["openai = 1", "[openai]\na = 1", '[openai]\na = {input = "1", output = 2}', "not toml", "[o]\na = {}"]
)
def test_prices_that_cannot_be_read_are_a_fault_of_the_settings(tmp_path: Path, text: str) -> None:
    put(tmp_path / "own.toml", text)
    with pytest.raises(SettingsError, match="MAINSPRING_PRICES_FILE"):
        load_prices(tmp_path / "own.toml")
    with pytest.raises(SettingsError, match="MAINSPRING_PRICES_FILE"):
        load_prices(tmp_path / "nowhere.toml")


def test_cached_tokens_have_their_own_price() -> None:
    prices = Prices(read_prices("[a]\nm = {input = 10, cached = 1, written = 20, output = 100}"))
    usage = prices.usage("a", "m", tokens=Tokens(input=1_000, output=10, cached=600, written=100))
    assert usage.cost_usd == pytest.approx((300 * 10 + 600 * 1 + 100 * 20 + 10 * 100) / 1e6)


@pytest.mark.parametrize("tool", ["run.sleep", "a", "a_b.c-d", "diagnostics.echo", "x." * 63 + "y"])
def test_a_tools_name_goes_over_the_wire_and_back(tool: str) -> None:
    name = wire_name(tool)
    assert "." not in name and len(name) <= WIRE_NAME_CHARACTERS_MAX
    assert tool_named(name, [tool.replace(".", "_") + "x", tool]) == tool


def test_no_two_tools_have_the_same_name_on_the_wire() -> None:
    names = ["a.b.c", "a_b.c", "a.b_c", "a_b_c", "a-b.c", "x." * 63 + "y", "x." * 63 + "z"]
    assert len({wire_name(name) for name in names}) == len(names)


def test_a_name_that_was_not_offered_is_read_as_what_it_says() -> None:
    assert tool_named("files__remove", ["a.b"]) == "files.remove"
    assert len(tool_named("x" * 1_000, [])) == 128


def model_at(base_url: str, addresses: set[str]) -> None:
    shop = Shop(Clients(), Credentials(None, {}), Prices(), addresses)
    make_model(plan(model={"provider": "openai", "name": "m", "base_url": base_url}), shop)


def test_a_specification_may_name_only_addresses_that_the_operator_allows() -> None:
    model_at("", set())
    model_at("https://models.internal/v1/", {"https://models.internal/v1"})
    model_at("http://anything", {"*"})
    for address in ("https://models.internal", "https://models.internal/v1/x", "http://169.254.169.254"):
        with pytest.raises(MainspringError) as raised:
            model_at(address, {"https://models.internal/v1"})
        assert (raised.value.reason_name, raised.value.metadata["field"]) == ("SPEC_INVALID", "model.base_url")


def test_production_allows_no_address_unless_it_is_told() -> None:
    secret = "a secret of thirty-two characters!"
    peers = {f"{name}_target": "127.0.0.1:1" for name in ("registry", "dispatcher", "state")}
    settings = {"auth_secret": secret, "service_secret": secret, **peers}
    assert ExecutionSettings(**settings).model_addresses() == frozenset()  # type: ignore[arg-type]  # as from outside
    told = ExecutionSettings(**settings, model_base_urls=" https://a/v1/ , ,http://b")  # type: ignore[arg-type]  # so
    assert told.model_addresses() == {"https://a/v1", "http://b"}


def test_models_are_told_of_agents_as_of_tools() -> None:
    called = describe("agent.clerk", description="Counts stock.")
    handed = describe("handoff.refunds", description="Gives money back.")
    assert called is not None and handed is not None
    assert "Counts stock." in called.description and "Gives money back." in handed.description
    assert orjson.loads(called.input_schema) == {"type": "object"}
    assert list(orjson.loads(handed.input_schema)["properties"]) == ["reason"]
    assert describe("run.nothing") is None
