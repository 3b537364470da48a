"""What an operator can change in the state service."""

from __future__ import annotations

from mainspring_kit.config import ProcessSettings, ServiceSettings
from pydantic import Field


class StateSettings(ServiceSettings):
    """The state service's settings; environment names are the fields' with `MAINSPRING_` before them."""

    listen: str = Field(
        "127.0.0.1:50054", pattern=r"^[^\s]+:\d{1,5}$", description="host:port to serve on; port 0: any"
    )
    database_url: str = Field(pattern=r"^postgres(ql)?://", description="PostgreSQL, as the role mainspring_state")
    database_connections_max: int = Field(
        8, ge=2, le=100, description="PostgreSQL connections for reads, claims and beats; one more commits"
    )
    redis_url: str = Field(
        pattern=r"^(rediss?|unix)://", description="Redis or Valkey; carries events between state processes"
    )
    backlog_appends_max: int = Field(16_384, ge=1, description="appends that may wait for the database")
    backlog_bytes_max: int = Field(256 << 20, ge=1 << 20, description="bytes of appends that may wait")
    follow_deliveries_max: int = Field(16_384, ge=16, description="deliveries that may wait on one Follow stream")
    follow_bytes_max: int = Field(64 << 20, ge=1 << 10, description="bytes that may wait on one Follow stream")
    subscriptions_max: int = Field(100_000, ge=1, description="subscriptions on one Follow stream")
    tail_runs_max: int = Field(20_000, ge=0, description="runs whose newest events are kept in memory")
    tail_bytes_max: int = Field(64 << 20, ge=0, description="bytes of such events")
    draft_bytes_max: int = Field(32 << 20, ge=0, description="bytes of unfinished text of model steps under way")
    lease_seconds: float = Field(3.0, ge=0.5, le=600, description="silence after which an executor is held for dead")
    broken_lease_seconds: float = Field(
        1.0, ge=0.1, le=600, description="the same, once its heartbeat stream has broken"
    )
    claim_seconds: float = Field(0.5, ge=0.05, le=60, description="longest time between two looks for claimable runs")
    webhook_private: bool = Field(
        False, description="webhooks may go to private addresses, as in a cluster of one's own"
    )


class MigrateSettings(ProcessSettings):
    """What `migrate` needs: it serves nobody, so it is given no key to sign or verify with."""

    database_url: str = Field(
        pattern=r"^postgres(ql)?://", description="what the service connects with, and the password its role gets"
    )
    owner_database_url: str = Field(
        pattern=r"^postgres(ql)?://", description="PostgreSQL, as a role that may create roles and schemas"
    )
