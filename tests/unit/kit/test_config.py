"""Settings come from the environment and every fault is reported at once."""

import pytest
from mainspring_kit.config import ServiceSettings, SettingsError, load, split_address

pytestmark = pytest.mark.unit


def test_all_faults_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSPRING_LISTEN", "nowhere")
    monkeypatch.setenv("MAINSPRING_LOG_LEVEL", "loud")
    monkeypatch.delenv("MAINSPRING_AUTH_SECRET", raising=False)
    with pytest.raises(SettingsError) as caught:
        load(ServiceSettings)
    for name in ("MAINSPRING_LISTEN", "MAINSPRING_LOG_LEVEL", "MAINSPRING_AUTH_SECRET (not set)"):
        assert name in str(caught.value)


def test_production_refuses_development_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSPRING_AUTH_SECRET", "dev-" + "a" * 40)
    monkeypatch.setenv("MAINSPRING_SERVICE_SECRET", "s" * 40)
    with pytest.raises(SettingsError, match="production refuses"):
        load(ServiceSettings)
    monkeypatch.setenv("MAINSPRING_ENVIRONMENT", "development")
    assert load(ServiceSettings).environment == "development"


def test_addresses_are_split() -> None:
    assert split_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_address("[::1]:80") == ("::1", 80)
