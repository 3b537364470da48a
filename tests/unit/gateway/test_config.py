"""The gateway's settings are checked as a whole."""

import pytest
from mainspring_gateway.config import GatewaySettings
from pydantic import ValidationError

pytestmark = pytest.mark.unit

SECRETS = {"auth_secret": "a" * 40, "service_secret": "s" * 40}


def settings(**changes: object) -> GatewaySettings:
    return GatewaySettings(**SECRETS, **changes)  # type: ignore[arg-type]  # checked when it runs: that is the test


def test_origins_are_as_browsers_send_them() -> None:
    found = settings(allowed_origins=" , ".join(["https://App.example", "http://localhost:3000"]))
    assert found.origins == {"https://app.example", "http://localhost:3000"}
    assert settings().origins == frozenset()
    assert settings(allowed_origins="*").origins == {"*"}


@pytest.mark.parametrize("origins", ["app.example", "https://app.example/", "https://app.example/path"])
def test_what_is_no_origin_is_refused(origins: str) -> None:
    with pytest.raises(ValidationError, match="is no origin"):
        settings(allowed_origins=origins)


@pytest.mark.parametrize("target", ["host:1", "host:1,other:2", "dns:///state:50054"])
def test_targets(target: str) -> None:
    assert settings(state_target=target).state_target == target


@pytest.mark.parametrize("target", ["", "host", "host:port", "host:1,", "host:1, other:2"])
def test_what_is_no_target_is_refused(target: str) -> None:
    with pytest.raises(ValidationError):
        settings(state_target=target)
