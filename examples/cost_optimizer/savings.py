"""Finds waste in a bill: what is idle, too large, on at night or left over, and what that costs a month."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Final

from examples.cost_optimizer.bill import Charge

MONTH_DAYS: Final = 30
# A pattern seen for less than two weeks may be chance.
FULL_EVIDENCE_DAYS: Final = 14
IDLE_SHARE: Final = Decimal("0.02")
LOW_SHARE: Final = Decimal("0.2")
UNUSED_GIB_DAY: Final = Decimal(1)
ALWAYS_ON_HOURS: Final = 20
# Twelve hours on five days of a week's 168.
OFFICE_SHARE: Final = Decimal(60) / Decimal(168)
EXAMPLES_MAX: Final = 5

_SIZES: Final = ("large", "xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")
_SMALLEST_VCPUS: Final = 2
_ACTIONS: Final = {
    "idle": "Stop {count} machines that use less than 2 percent of their vCPUs.",
    "off-hours": "Switch off {count} machines of test accounts at night and on weekends.",
    "oversized": "Take {count} machines and databases one size down: they use less than 20 percent of their vCPUs.",
    "unattached": "Delete {count} disks that nothing reads or writes, after a snapshot.",
    "unused": "Delete {count} load balancers and addresses without traffic.",
}


@dataclass(slots=True)
class Resource:
    """What a bill says of one resource."""

    account: str
    service: str
    region: str
    resource_id: str
    cost: Decimal = Decimal(0)
    days: set[date] = field(default_factory=set)
    vcpus: int = 0
    hours: dict[date, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    used: dict[date, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    requests: Decimal = Decimal(0)
    gib: dict[date, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    kinds: set[str] = field(default_factory=set)

    def add(self, charge: Charge) -> None:
        """Counts a line."""
        self.cost += charge.cost
        self.days.add(charge.date)
        kind, _, detail = charge.usage_type.partition(":")
        self.kinds.add(kind)
        if kind == "hours":
            self.hours[charge.date] += charge.quantity
            self.vcpus = _vcpus(detail)
        elif kind == "used-vcpu-hours":
            self.used[charge.date] += charge.quantity
        elif kind == "requests":
            self.requests += charge.quantity
        elif kind == "gib":
            self.gib[charge.date] += charge.quantity

    def days_below(self, share: Decimal) -> int:
        """On how many days it used less than this share of its vCPUs."""
        return sum(self.used[day] < share * hours * self.vcpus for day, hours in self.hours.items())

    def used_share(self) -> Decimal:
        """The share of its vCPUs that it used over the whole bill."""
        capacity = sum(self.hours.values(), Decimal(0)) * self.vcpus
        return sum(self.used.values(), Decimal(0)) / capacity if capacity else Decimal(0)


@dataclass(frozen=True, slots=True)
class Finding:
    """One resource's waste: what it cost in US dollars over the bill's days, and on how many of them it was seen."""

    pattern: str
    resource: Resource
    saving: Decimal
    held: int

    @property
    def confidence(self) -> Decimal:
        """The share of days on which it was seen, less where there are few."""
        observed = len(self.resource.days)
        return Decimal(self.held) / observed * min(Decimal(1), Decimal(observed) / FULL_EVIDENCE_DAYS)


def find(charges: Iterable[Charge]) -> list[Finding]:
    """The waste in a bill: of each resource the pattern that saves most."""
    resources: dict[str, Resource] = {}
    for charge in charges:
        resource = resources.get(charge.resource_id)
        if resource is None:
            resource = resources[charge.resource_id] = Resource(
                charge.account, charge.service, charge.region, charge.resource_id
            )
        resource.add(charge)
    found = []
    for resource in resources.values():
        best = max(_patterns(resource), key=lambda finding: finding.saving, default=None)
        if best is not None and best.saving > 0:
            found.append(best)
    return found


def recommend(findings: Iterable[Finding], *, days: int) -> list[dict[str, object]]:
    """One recommendation a pattern, the one that saves most first, as JSON."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.pattern].append(finding)
    ranked = sorted(groups.items(), key=lambda item: -sum(finding.saving for finding in item[1]))
    return [_recommendation(pattern, group, days=days) for pattern, group in ranked]


def confidence(findings: Iterable[Finding]) -> Decimal:
    """How sure the findings are together, each weighted by what it saves."""
    known = list(findings)
    saving = sum((finding.saving for finding in known), Decimal(0))
    return (
        sum((finding.confidence * finding.saving for finding in known), Decimal(0)) / saving if saving else Decimal(0)
    )


def monthly(amount: Decimal, *, days: int) -> Decimal:
    """What an amount of so many days is in a month."""
    return amount * MONTH_DAYS / days


def dollars(amount: Decimal) -> float:
    """An amount as JSON has it, to the cent."""
    return float(round(amount, 2))


def _patterns(resource: Resource) -> Iterator[Finding]:
    observed = len(resource.days)
    if resource.service in ("compute", "database") and resource.vcpus:
        share = resource.used_share()
        if resource.service == "compute" and share < IDLE_SHARE:
            yield Finding("idle", resource, resource.cost, resource.days_below(IDLE_SHARE))
        elif share < LOW_SHARE and resource.vcpus > _SMALLEST_VCPUS:
            yield Finding("oversized", resource, resource.cost / 2, resource.days_below(LOW_SHARE))
        always_on = sum(hours >= ALWAYS_ON_HOURS for hours in resource.hours.values())
        weekend = any(day.weekday() >= 5 for day in resource.hours)
        if resource.service == "compute" and not resource.account.startswith("prod") and always_on and weekend:
            yield Finding("off-hours", resource, resource.cost * (1 - OFFICE_SHARE), always_on)
    elif resource.service == "disk" and not resource.requests:
        yield Finding("unattached", resource, resource.cost, observed)
    elif resource.service == "load-balancer":
        quiet = sum(resource.gib[day] < UNUSED_GIB_DAY for day in resource.hours)
        if quiet == observed:
            yield Finding("unused", resource, resource.cost, quiet)
    elif "idle-hours" in resource.kinds:
        yield Finding("unused", resource, resource.cost, observed)


def _recommendation(pattern: str, group: list[Finding], *, days: int) -> dict[str, object]:
    dearest = sorted(group, key=lambda finding: (-finding.saving, finding.resource.resource_id))[:EXAMPLES_MAX]
    return {
        "pattern": pattern,
        "action": _ACTIONS[pattern].format(count=len(group)),
        "monthly_saving_usd": dollars(monthly(sum((f.saving for f in group), Decimal(0)), days=days)),
        "confidence": float(round(confidence(group), 2)),
        "resources": len(group),
        "dearest": [
            {
                "resource_id": finding.resource.resource_id,
                "account": finding.resource.account,
                "monthly_saving_usd": dollars(monthly(finding.saving, days=days)),
            }
            for finding in dearest
        ],
    }


def _vcpus(detail: str) -> int:
    """`m5.2xlarge` has 8; 0 where the size is not known."""
    size = detail.rpartition(".")[2]
    return _SMALLEST_VCPUS * 2 ** _SIZES.index(size) if size in _SIZES else 0
