"""What a schedule must be, when it fires, and what becomes of times at which it could not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from jsonschema import Draft202012Validator
from mainspring.v1 import registry_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason, Violation

from mainspring_registry.core.document import DocumentError, JsonValue, read_document, write_canonical
from mainspring_registry.core.schema import faults_of
from mainspring_registry.core.spec import spec_invalid

INPUT_BYTES_MAX: Final = 64 << 10
MISSED_RUNS_MAX: Final = 100
# A time that is looked at no later was not missed.
PUNCTUAL: Final = timedelta(seconds=60)

_MISSED: Final = {
    "skip": registry_pb2.MISSED_POLICY_SKIP,
    "once": registry_pb2.MISSED_POLICY_ONCE,
    "all": registry_pb2.MISSED_POLICY_ALL,
}
_OVERLAP: Final = {
    "enqueue": types_pb2.SESSION_POLICY_ENQUEUE,
    "reject": types_pb2.SESSION_POLICY_REJECT,
    "interrupt": types_pb2.SESSION_POLICY_INTERRUPT,
    "parallel": types_pb2.SESSION_POLICY_PARALLEL,
}


@dataclass(frozen=True, slots=True)
class Timetable:
    """When a schedule fires; its times are those of the zone, given in UTC."""

    cron: str
    zone: tzinfo

    def after(self, moment: datetime) -> datetime | None:
        """The next time after a moment; None: never."""
        return next(self._times(moment), None)

    def since(self, first: datetime, now: datetime) -> list[datetime]:
        """The times from `first` to `now`, oldest first: the latest ones, at most MISSED_RUNS_MAX."""
        found: list[datetime] = []
        for moment in self._times(now + timedelta(seconds=1), reverse=True):
            if moment < first or len(found) >= MISSED_RUNS_MAX:
                break
            if moment <= now:
                found.append(moment)
        return found[::-1]

    def _times(self, moment: datetime, *, reverse: bool = False) -> Iterator[datetime]:
        try:
            for found in CronSim(self.cron, moment.astimezone(self.zone), reverse=reverse):
                yield found.astimezone(UTC)
        except StopIteration:
            return


@dataclass(frozen=True, slots=True)
class Firing:
    """What a due schedule does now: the times for which it starts a run, and when it is due again; None: never."""

    times: Sequence[datetime]
    next_time: datetime | None


def read_schedule(document: bytes, schema: Draft202012Validator) -> registry_pb2.Schedule:
    """The schedule that a document specifies, without its user and times. SPEC_INVALID lists every fault."""
    try:
        spec = read_document(document)
    except DocumentError as error:
        raise spec_invalid([error.violation]) from error
    if faults := faults_of(spec, schema) or list(_check_meaning(spec)):
        raise spec_invalid(faults)
    return registry_pb2.Schedule(
        name=spec["name"],
        cron=spec["cron"],
        time_zone=spec.get("time_zone", ""),
        agent=spec["agent"],
        alias=spec.get("alias", ""),
        input=write_canonical(spec.get("input", {})).encode(),
        missed=_MISSED[spec.get("missed", "once")],
        overlap=_OVERLAP[spec.get("overlap", "enqueue")],
        paused=spec.get("paused", False),
    )


def timetable(schedule: registry_pb2.Schedule) -> Timetable:
    """When a stored schedule fires."""
    return Timetable(schedule.cron, _zone(schedule.time_zone))


def plan_firing(schedule: registry_pb2.Schedule, due: datetime, *, now: datetime) -> Firing:
    """What a schedule that was due at `due` does at `now`."""
    table = timetable(schedule)
    times = table.since(due, now)
    punctual = [moment for moment in times if now - moment <= PUNCTUAL]
    if schedule.missed == registry_pb2.MISSED_POLICY_SKIP:
        times = punctual
    elif schedule.missed != registry_pb2.MISSED_POLICY_ALL and len(punctual) < len(times):
        # One run for all that were missed: the newest stands for them.
        times = times[-1:]
    return Firing(times, table.after(now))


def session_id(schedule: registry_pb2.Schedule) -> str:
    """The session of a schedule's runs, whose policy is the schedule's overlap."""
    policy = next(name for name, number in _OVERLAP.items() if number == schedule.overlap)
    return f"schedule:{schedule.name}:{policy}"


def idempotency_key(schedule: registry_pb2.Schedule, moment: datetime) -> str:
    """What makes one run of one time, however often it is started."""
    return f"schedule/{schedule.name}/{moment:%Y-%m-%dT%H:%M:%SZ}"


def read_name(name: str) -> str:
    """A schedule's name that may exist; SCHEDULE_NOT_FOUND for one that no column could hold."""
    if "\x00" in name:
        raise schedule_not_found(name)
    return name


def schedule_not_found(name: str) -> MainspringError:
    """SCHEDULE_NOT_FOUND for this name."""
    return MainspringError(
        Reason.SCHEDULE_NOT_FOUND,
        f"There is no schedule {name[:63]!r} in this tenant: list the schedules for the right name.",
        schedule=name[:63],
    )


def _check_meaning(spec: dict[str, JsonValue]) -> Iterator[Violation]:
    zone: tzinfo = UTC
    try:
        zone = _zone(spec.get("time_zone", ""))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        yield Violation("time_zone", f"{spec['time_zone']!r} is not an IANA time zone such as Europe/Berlin")
    try:
        CronSim(spec["cron"], datetime(2026, 1, 1, tzinfo=zone))
    except CronSimError as error:
        yield Violation("cron", f"{spec['cron']!r} is not a cron expression such as `*/5 * * * *`: {error}")
    size_bytes = len(write_canonical(spec.get("input", {})).encode())
    if size_bytes > INPUT_BYTES_MAX:
        yield Violation("input", f"takes {size_bytes} bytes as JSON; at most {INPUT_BYTES_MAX} are taken")


def _zone(name: str) -> tzinfo:
    return ZoneInfo(name) if name else UTC
