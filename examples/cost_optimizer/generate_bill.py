"""Makes the bill that the example reads: a month of an imaginary company's cloud, with the waste that such bills hold.

    python examples/cost_optimizer/generate_bill.py --seed 7 > examples/cost_optimizer/bill.csv

The same seed makes the same bill to the byte. Used vCPU hours, requests and traffic appear as lines without a price, as
in detailed exports; they are what tells an idle machine from a busy one.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import TextIO

COLUMNS = ("date", "account", "service", "region", "resource_id", "usage_type", "quantity", "unit_price", "cost")
FIRST_DAY = date(2026, 10, 1)
REGIONS = ("eu-central", "eu-west", "us-east")
# US dollars an hour; each size has twice the vCPUs and the price of the one before.
SMALLEST_PRICE = Decimal("0.048")
SIZES = ("large", "xlarge", "2xlarge", "4xlarge", "8xlarge")
SMALLEST_VCPUS = 2
DISK_GIB_DAY = Decimal("0.0029")
STORAGE_GIB_DAY = Decimal("0.00077")
BALANCER_HOUR = Decimal("0.0225")
TRAFFIC_GIB = Decimal("0.008")
IDLE_ADDRESS_HOUR = Decimal("0.005")
DATABASE_FACTOR = Decimal("1.9")


@dataclass(frozen=True, slots=True)
class Line:
    """One line before it is priced."""

    account: str
    service: str
    region: str
    resource_id: str
    usage_type: str
    quantity: Decimal
    unit_price: Decimal


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine or a database: how large, how busy, and whether somebody switches it off at night."""

    account: str
    service: str
    region: str
    resource_id: str
    size: int
    busy: float
    sleeps: bool

    def lines(self, day: date, chance: random.Random) -> Iterator[Line]:
        """What a day of it costs and does."""
        hours = Decimal(0 if day.weekday() >= 5 else 12) if self.sleeps else Decimal(24)
        if not hours:
            return
        factor = DATABASE_FACTOR if self.service == "database" else Decimal(1)
        kind = f"{'db' if self.service == 'database' else 'm5'}.{SIZES[self.size]}"
        price = SMALLEST_PRICE * 2**self.size * factor
        vcpu_hours = float(hours) * SMALLEST_VCPUS * 2**self.size
        used = rounded(vcpu_hours * self.busy * chance.uniform(0.8, 1.2), places=2)
        where = (self.account, self.service, self.region, self.resource_id)
        yield Line(*where, f"hours:{kind}", hours, price)
        yield Line(*where, f"used-vcpu-hours:{kind}", used, Decimal(0))


def main() -> None:
    """Writes the bill to standard output."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=7)
    options.add_argument("--days", type=int, default=30)
    arguments = options.parse_args()
    write_bill(sys.stdout, seed=arguments.seed, days=arguments.days)


def write_bill(file: TextIO, *, seed: int, days: int) -> None:
    """Writes a whole bill as CSV."""
    chance = random.Random(seed)
    machines = list(_machines(chance))
    disks = list(_disks(chance))
    edges = list(_edges(chance))
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for offset in range(days):
        day = FIRST_DAY + timedelta(days=offset)
        lines = [line for machine in machines for line in machine.lines(day, chance)]
        lines += [line for disk in disks for line in _vary(disk, chance)]
        lines += [line for edge in edges for line in _vary(edge, chance)]
        for line in lines:
            cost = rounded(line.quantity * line.unit_price, places=4)
            writer.writerow(
                (
                    day.isoformat(),
                    line.account,
                    line.service,
                    line.region,
                    line.resource_id,
                    line.usage_type,
                    line.quantity,
                    line.unit_price,
                    cost,
                )
            )


def rounded(value: float | Decimal, *, places: int) -> Decimal:
    """A decimal with so many places and no exponent."""
    return Decimal(value).quantize(Decimal(1).scaleb(-places))


def _machines(chance: random.Random) -> Iterator[Machine]:
    """Busy ones, some too large, some that nobody uses, and test machines that run all night."""
    for account, count, sleeping in (
        ("prod-shop", 20, 0),
        ("prod-data", 14, 0),
        ("staging", 10, 3),
        ("development", 12, 4),
    ):
        for number in range(count):
            busy = chance.choices((0.5, 0.1, 0.005), weights=(6, 3, 1))[0] * chance.uniform(0.8, 1.2)
            yield Machine(
                account=account,
                service="compute",
                region=chance.choice(REGIONS),
                resource_id=f"i-{chance.getrandbits(40):010x}",
                size=chance.choices(range(len(SIZES)), weights=(5, 5, 4, 2, 1))[0],
                busy=busy,
                sleeps=number < sleeping,
            )
    for account in ("prod-shop", "prod-shop", "prod-data", "prod-data", "staging"):
        yield Machine(
            account=account,
            service="database",
            region=chance.choice(REGIONS),
            resource_id=f"db-{chance.getrandbits(40):010x}",
            size=chance.randrange(1, 4),
            busy=chance.uniform(0.05, 0.6),
            sleeps=False,
        )


def _disks(chance: random.Random) -> Iterator[list[Line]]:
    """Each with its requests; those of disks that hang on nothing are missing."""
    for account, count in (("prod-shop", 12), ("prod-data", 10), ("staging", 6), ("development", 8)):
        for _ in range(count):
            where = (account, "disk", chance.choice(REGIONS), f"vol-{chance.getrandbits(40):010x}")
            size = Decimal(chance.choice((50, 100, 200, 500, 1000, 2000)))
            lines = [Line(*where, "gib-days:gp3", size, DISK_GIB_DAY)]
            if chance.random() > 0.25:
                lines.append(Line(*where, "requests:gp3", Decimal(chance.randrange(1_000, 900_000)), Decimal(0)))
            yield lines


def _edges(chance: random.Random) -> Iterator[list[Line]]:
    """Load balancers, some with no traffic; addresses that belong to nothing; storage."""
    for account in ("prod-shop", "prod-shop", "prod-data", "staging", "development", "development"):
        where = (account, "load-balancer", chance.choice(REGIONS), f"lb-{chance.getrandbits(40):010x}")
        traffic = Decimal(chance.randrange(50, 900)) if account.startswith("prod") else Decimal("0.1")
        yield [
            Line(*where, "hours:balancer", Decimal(24), BALANCER_HOUR),
            Line(*where, "gib:balancer", traffic, TRAFFIC_GIB),
        ]
    for account in ("prod-shop", "staging", "development"):
        where = (account, "address", chance.choice(REGIONS), f"ip-{chance.getrandbits(40):010x}")
        yield [Line(*where, "idle-hours:address", Decimal(24), IDLE_ADDRESS_HOUR)]
    for account in ("prod-shop", "prod-data", "prod-data", "staging"):
        where = (account, "storage", chance.choice(REGIONS), f"bucket-{chance.getrandbits(24):06x}")
        yield [Line(*where, "gib-days:standard", Decimal(chance.randrange(500, 40_000)), STORAGE_GIB_DAY)]


def _vary(lines: list[Line], chance: random.Random) -> Iterator[Line]:
    """The same resource on another day: its work varies, its size does not."""
    for line in lines:
        if line.usage_type.startswith(("requests:", "gib:")):
            quantity = rounded(float(line.quantity) * chance.uniform(0.7, 1.3), places=2)
            yield Line(
                line.account, line.service, line.region, line.resource_id, line.usage_type, quantity, line.unit_price
            )
        else:
            yield line


if __name__ == "__main__":
    main()
