"""What `state.append_batch` is given, by name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from tests.simulation.asking import Row

# Any in this module: arguments and rows are what the migration says.


class Batch:
    """The arguments of `state.append` by name."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        (
            self.tenants, self.runs, self.append_ids, self.expected_seqs, self.epochs,
            self.from_states, self.to_states, self.progresses,
            self.event_firsts, self.event_lasts, self.types, self.events, self.event_time,
            self.create_count, self.users, self.session_ids, self.policies, self.agents, self.versions,
            self.run_inputs, self.keys, self.hashes, self.executors, self.deadlines, self.traces,
            self.end_first, self.results, self.errors, self.all_stages, self.usages,
            self.consumed_items, self.consumed_requests, self.interrupt_payload,
            self.root_count, self.parents, self.roots, self.parent_calls, self.depths,
            self.sources, self.source_seqs, self.attempts, self.priorities, self.hook_urls, self.hook_credentials,
            self.release_items, self.release_dues,
            self.model_counts, self.tool_counts, self.error_counts, self.cache_counts, self.retry_counts, self.waitings,
            self.ask_items, self.ask_seqs, self.ask_kinds, self.ask_roles, self.ask_titles, self.ask_calls,
            self.ask_arguments, self.ask_schemas, self.ask_expires,
            self.resolve_items, self.resolve_seqs, self.resolve_decisions, self.resolve_by, self.resolve_data,
            self.stands, self.queue_onlys, self.dues, self.weights, self.backlogs, self.backlog_least,
            self.cap_items, self.cap_scopes, self.cap_limits,
        ) = ([] if value is None else value for value in arguments)  # fmt: skip

    def stands_in_line(self, i: int) -> bool:
        """Whether a create has to stand in a line besides its session's."""
        return bool(self.stands and self.stands[i])

    def is_queue_only(self, i: int) -> bool:
        """Whether its creator has no room for it."""
        return bool(self.queue_onlys and self.queue_onlys[i])

    def due(self, i: int) -> datetime | None:
        """Before when it shall not begin."""
        due: datetime | None = self.dues[i] if self.dues else None
        return due

    def caps_of(self, i: int) -> list[tuple[str, int]]:
        """Scopes and their limits."""
        return [(self.cap_scopes[k], self.cap_limits[k]) for k, item in enumerate(self.cap_items) if item == i + 1]

    def asked(self, k: int) -> Row:
        """A new row of `approvals`."""
        return {
            "kind": self.ask_kinds[k],
            "role": self.ask_roles[k],
            "expires_time": self.ask_expires[k],
            "call_id": self.ask_calls[k],
            "decision": 0,
            "answered_by": "",
            "data": b"",
        }

    def resolved(self, k: int) -> Row:
        """What becomes of it."""
        return {
            "decision": self.resolve_decisions[k],
            "answered_by": self.resolve_by[k],
            "data": self.resolve_data[k],
        }

    def counted(self) -> list[tuple[str, Sequence[Any]]]:
        """The columns of the metrics that come from the holder, each with a value for each end."""
        names = ("model_counts", "tool_counts", "error_counts", "cache_counts", "retry_counts", "waitings")
        return [(name, getattr(self, name)) for name in names]
