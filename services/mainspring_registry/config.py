"""What an operator can change in the registry."""

from __future__ import annotations

from mainspring_kit.config import ProcessSettings, ServiceSettings
from pydantic import Field


class RegistrySettings(ServiceSettings):
    """The registry's settings; environment names are the fields' with `MAINSPRING_` before them."""

    listen: str = Field(
        "127.0.0.1:50051", pattern=r"^[^\s]+:\d{1,5}$", description="host:port to serve on; port 0: any"
    )
    database_url: str = Field(pattern=r"^postgres(ql)?://", description="PostgreSQL, as the role mainspring_registry")
    database_connections_max: int = Field(
        8, ge=1, le=100, description="PostgreSQL connections for calls; one more listens"
    )
    execution_target: str = Field(
        "127.0.0.1:50053",
        min_length=1,
        description="execution, which starts the runs of schedules: host:port[,host:port…] or dns:///name:port",
    )
    watchers_max: int = Field(256, ge=1, le=10_000, description="WatchCatalog streams served at once")


class MigrateSettings(ProcessSettings):
    """What `migrate` needs: it serves nobody, so it is given no key to sign or verify with."""

    database_url: str = Field(
        pattern=r"^postgres(ql)?://", description="what the service connects with, and the password its role gets"
    )
    owner_database_url: str = Field(
        pattern=r"^postgres(ql)?://", description="PostgreSQL, as a role that may create roles and schemas"
    )
