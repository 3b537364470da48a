"""What an operator can change in the execution service."""

from __future__ import annotations

from mainspring_kit.config import ServiceSettings
from pydantic import Field


class ExecutionSettings(ServiceSettings):
    """Settings of `python -m mainspring_execution`."""

    listen: str = Field(
        "127.0.0.1:50053", pattern=r"^[^\s]+:\d{1,5}$", description="host:port to serve on; port 0: any"
    )
    registry_target: str = Field(min_length=1, description="the registry: host:port[,host:port…] or dns:///name:port")
    dispatcher_target: str = Field(min_length=1, description="the dispatcher, in the same syntax")
    state_target: str = Field(min_length=1, description="state, in the same syntax")
    runs_max: int = Field(2_000, ge=1, le=10_000, description="runs driven at once; above it they wait in line")
    credentials_dir: str = Field(
        "",
        description="folder of model providers' keys, `<tenant>/<name>` or `<name>`; besides `MAINSPRING_CREDENTIAL_*`",
    )
    prices_file: str = Field("", description="TOML file of models' prices, besides the platform's own")
    model_base_urls: str = Field(
        "",
        description="what `model.base_url` of a specification may be, comma-separated; `*`: all, as in development",
    )

    def model_addresses(self) -> frozenset[str]:
        """Those that a specification may name; `*`: all."""
        if self.environment == "development":
            return frozenset({"*"})
        return frozenset(address.strip().rstrip("/") for address in self.model_base_urls.split(",") if address.strip())
