"""The settings that every process has, and how settings are read: from the environment, all faults reported at once."""

from __future__ import annotations

import os
from typing import Literal, Self, TypeVar
from uuid import uuid4

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENVIRONMENT_PREFIX = "MAINSPRING_"


class ProcessSettings(BaseSettings):
    """What an operator can change in every process: `MAINSPRING_` + the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="ignore", frozen=True)

    instance_id: str = Field(
        default_factory=lambda: uuid4().hex[:12], max_length=64, description="names this process among its replicas"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    parent_fd: int = Field(-1, description="a pipe's read end; at its end of file the process stops. -1: none")


class ServiceSettings(ProcessSettings):
    """What an operator can change besides in every process that serves."""

    listen: str = Field("127.0.0.1:0", pattern=r"^[^\s]+:\d{1,5}$", description="host:port to serve on; port 0: any")
    auth_secret: SecretStr = Field(min_length=32, description="HS256 key of users' tokens, at least 32 characters")
    service_secret: SecretStr = Field(
        min_length=32, description="HS256 key of services' tokens, at least 32 characters"
    )
    environment: Literal["production", "development"] = Field(
        "production", description="production refuses development secrets and diagnostic tools"
    )
    drain_seconds: float = Field(10.0, ge=0, le=600, description="time that work under way gets at shutdown")
    metrics_listen: str = Field(
        "", pattern=r"^$|^[^\s]+:\d{1,5}$", description="host:port of the Prometheus metrics; empty: none"
    )

    @model_validator(mode="after")
    def _refuse_development_secrets(self) -> Self:
        if self.environment == "production":
            for name in ("auth_secret", "service_secret"):
                if getattr(self, name).get_secret_value().startswith("dev-"):
                    raise ValueError(
                        f"{ENVIRONMENT_PREFIX}{name.upper()} is a development secret (dev-…); production refuses it"
                    )
        return self


class SettingsError(Exception):
    """The environment does not describe a process that could run; the message lists every fault."""


Settings = TypeVar("Settings", bound=ProcessSettings)


def load(settings_class: type[Settings]) -> Settings:
    """Reads the environment; raises SettingsError with one line per fault, naming the variable."""
    try:
        return settings_class()
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            name = ENVIRONMENT_PREFIX + "_".join(str(part) for part in fault["loc"]).upper()
            where = name if fault["loc"] else "settings"
            state = "" if not fault["loc"] or name in os.environ else " (not set)"
            lines.append(f"  {where}{state}: {fault['msg']}")
        raise SettingsError("The settings are not usable:\n" + "\n".join(lines)) from error


def split_address(address: str) -> tuple[str, int]:
    """`host:port` (IPv6 hosts in brackets) to its parts."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
