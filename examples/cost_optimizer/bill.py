"""Reads a bill line by line and adds it up. Knows the columns, and refuses a line that it can't trust."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Final, Literal

Dimension = Literal["account", "service", "region"]

# Bills round each line's cost to a hundredth of a cent or so; more than this is another price.
ROUNDING_MAX: Final = Decimal("0.005")


class BillError(Exception):
    """A bill can't be read; the message names the file and the line, counted from 1; 0: the file as a whole."""

    def __init__(self, file: str, line: int, fault: str) -> None:
        if line:
            super().__init__(f"{file}, line {line}: {fault}. Mend that line, or export the bill again.")
        else:
            super().__init__(f"{file}: {fault}. Give the path of a bill in CSV.")
        self.file = file
        self.line = line


@dataclass(frozen=True, slots=True)
class Charge:
    """One line: what one resource used of one thing on one day. `cost` is in US dollars."""

    date: date
    account: str
    service: str
    region: str
    resource_id: str
    usage_type: str
    quantity: Decimal
    unit_price: Decimal
    cost: Decimal


COLUMNS: Final = tuple(field.name for field in fields(Charge))


@dataclass(slots=True)
class Summary:
    """A whole bill in a few figures."""

    lines: int = 0
    cost: Decimal = Decimal(0)
    first_day: date = date.max
    last_day: date = date.min

    @property
    def days(self) -> int:
        """How many days it spans."""
        return (self.last_day - self.first_day).days + 1 if self.lines else 0

    def add(self, charge: Charge) -> None:
        """Counts a line."""
        self.lines += 1
        self.cost += charge.cost
        self.first_day = min(self.first_day, charge.date)
        self.last_day = max(self.last_day, charge.date)


def read_charges(path: Path) -> Iterator[Charge]:
    """Yields the lines of a bill; BillError names the first that is wrong. Never holds more than one."""
    try:
        # Spreadsheets begin UTF-8 with a mark. Bytes that are none of it are kept until their line is known.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file, strict=True)
            try:
                yield from _charges(rows, path.name)
            except csv.Error as error:
                raise BillError(path.name, rows.line_num, f"it is not CSV: {error}") from error
            except UnicodeEncodeError as error:
                raise BillError(path.name, rows.line_num, "it is not UTF-8: save the file in that encoding") from error
    except OSError as error:
        raise BillError(str(path), 0, f"the file can't be read: {error.strerror}") from error


def summarize(charges: Iterable[Charge]) -> Summary:
    """Adds a bill up."""
    summary = Summary()
    for charge in charges:
        summary.add(charge)
    return summary


def total_by(charges: Iterable[Charge], dimension: Dimension) -> dict[str, Decimal]:
    """What each account, service or region costs, the dearest first."""
    totals: dict[str, Decimal] = defaultdict(Decimal)
    for charge in charges:
        totals[getattr(charge, dimension)] += charge.cost
    return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))


def _charges(rows: Iterator[list[str]], file: str) -> Iterator[Charge]:
    header = next(rows, [])
    _refuse_other_encodings(header)
    if tuple(header) != COLUMNS:
        raise BillError(file, 1, f"the columns are {','.join(header) or 'missing'}; they must be {','.join(COLUMNS)}")
    count = 0
    for row in rows:
        count += 1
        _refuse_other_encodings(row)
        line: int = rows.line_num  # type: ignore[attr-defined]  # of the csv reader, which has no type of its own
        if len(row) != len(COLUMNS):
            raise BillError(file, line, f"it has {len(row)} columns, the header has {len(COLUMNS)}")
        try:
            yield _charge(row)
        except ValueError as error:
            raise BillError(file, line, str(error)) from error
    if not count:
        raise BillError(file, 2, "there is no line after the header")


def _refuse_other_encodings(row: list[str]) -> None:
    "".join(row).encode()


def _charge(row: list[str]) -> Charge:
    try:
        day = date.fromisoformat(row[0])
    except ValueError as error:
        raise ValueError(f"date is {row[0]!r}, not a day such as 2026-10-31") from error
    for name, text in zip(COLUMNS[1:6], row[1:6], strict=True):
        if not text.strip():
            raise ValueError(f"{name} is empty")
    quantity, unit_price, cost = (_amount(name, text) for name, text in zip(COLUMNS[6:], row[6:], strict=True))
    if abs(quantity * unit_price - cost) > ROUNDING_MAX:
        raise ValueError(f"cost is {cost}, but quantity times unit_price is {quantity * unit_price}")
    account, service, region, resource_id, usage_type = row[1:6]
    return Charge(day, account, service, region, resource_id, usage_type, quantity, unit_price, cost)


def _amount(name: str, text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation as error:
        raise ValueError(f"{name} is {text!r}, not a number") from error
    if not amount.is_finite() or amount < 0:
        raise ValueError(f"{name} is {text!r}, not a number of 0 or more")
    return amount
