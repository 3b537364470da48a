"""The example's arithmetic: the bill is read exactly, each kind of waste is found, and a wrong line is named."""

from __future__ import annotations

import io
from collections.abc import Iterable
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from mainspring import ToolError

from examples.cost_optimizer import savings, tools
from examples.cost_optimizer.bill import COLUMNS, BillError, Charge, read_charges, summarize, total_by
from examples.cost_optimizer.generate_bill import write_bill

HEADER = ",".join(COLUMNS)
GOOD = "2026-10-01,prod,compute,eu,i-1,hours:m5.xlarge,24,0.096,2.304"
BILL = Path(__file__).parents[3] / "examples" / "cost_optimizer" / "bill.csv"


def charges(
    usage: Iterable[tuple[str, str, str]], *, account: str = "prod", service: str = "compute", days: int = 28
) -> list[Charge]:
    """The same usage (type, quantity, unit price) of one resource on each day."""
    return [
        Charge(
            date(2026, 10, 1) + timedelta(days=day),
            account,
            service,
            "eu",
            "r-1",
            kind,
            Decimal(quantity),
            Decimal(price),
            Decimal(quantity) * Decimal(price),
        )
        for day in range(days)
        for kind, quantity, price in usage
    ]


def test_the_committed_bill_is_what_the_generator_makes() -> None:
    made = io.StringIO()
    write_bill(made, seed=7, days=30)
    assert BILL.read_text() == made.getvalue()
    assert len(made.getvalue().splitlines()) > 5_000


def test_a_bill_that_a_spreadsheet_saved_is_read(tmp_path: Path) -> None:
    (tmp_path / "bill.csv").write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\n{GOOD}\r\n".encode())
    assert [charge.resource_id for charge in read_charges(tmp_path / "bill.csv")] == ["i-1"]


def test_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    lines = [HEADER, *[GOOD] * 3_000, GOOD.replace("prod", "caf\xe9"), GOOD]
    (tmp_path / "bill.csv").write_bytes("\n".join(lines).encode("cp1252"))
    with pytest.raises(BillError, match=r"bill\.csv, line 3002: it is not UTF-8"):
        list(read_charges(tmp_path / "bill.csv"))


def test_another_seed_makes_another_bill(tmp_path: Path) -> None:
    impacts = []
    for seed in (7, 8):
        with (tmp_path / "bill.csv").open("w") as file:
            write_bill(file, seed=seed, days=10)
        impacts.append(tools.find_savings(str(tmp_path / "bill.csv"))["impact"])
    assert impacts[0] != impacts[1]


def test_the_committed_bill_holds_every_kind_of_waste() -> None:
    found = tools.find_savings(str(BILL))
    assert {row["pattern"] for row in found["recommendations"]} == {
        "idle",
        "off-hours",
        "oversized",
        "unattached",
        "unused",
    }
    assert found["impact"]["monthly_saving_usd"] == pytest.approx(
        sum(row["monthly_saving_usd"] for row in found["recommendations"]), abs=0.05
    )
    assert 0 < found["impact"]["saving_share"] < 1
    assert 0 < found["confidence"] <= 1


def test_totals_add_up() -> None:
    whole = summarize(read_charges(BILL))
    for dimension in ("account", "service", "region"):
        totals = total_by(read_charges(BILL), dimension)
        assert sum(totals.values()) == whole.cost
        assert list(totals.values()) == sorted(totals.values(), reverse=True)


@pytest.mark.parametrize(
    ("account", "service", "usage", "pattern", "share"),
    [
        ("prod", "compute", [("hours:m5.xlarge", "24", "0.1"), ("used-vcpu-hours:m5.xlarge", "1", "0")], "idle", "1"),
        (
            "prod",
            "compute",
            [("hours:m5.xlarge", "24", "0.1"), ("used-vcpu-hours:m5.xlarge", "10", "0")],
            "oversized",
            "0.5",
        ),
        (
            "development",
            "compute",
            [("hours:m5.xlarge", "24", "0.1"), ("used-vcpu-hours:m5.xlarge", "90", "0")],
            "off-hours",
            "0.642857",
        ),
        ("prod", "disk", [("gib-days:gp3", "100", "0.003")], "unattached", "1"),
        ("prod", "load-balancer", [("hours:balancer", "24", "0.02"), ("gib:balancer", "0.1", "0.01")], "unused", "1"),
        ("prod", "address", [("idle-hours:address", "24", "0.005")], "unused", "1"),
    ],
)
def test_each_kind_of_waste_is_found_and_priced(
    account: str, service: str, usage: list[tuple[str, str, str]], pattern: str, share: str
) -> None:
    bill = charges(usage, account=account, service=service)
    [finding] = savings.find(bill)
    assert finding.pattern == pattern
    assert finding.saving / summarize(bill).cost == pytest.approx(Decimal(share), abs=Decimal("0.0001"))
    assert finding.confidence == 1


@pytest.mark.parametrize(
    ("service", "usage"),
    [
        ("compute", [("hours:m5.xlarge", "24", "0.1"), ("used-vcpu-hours:m5.xlarge", "60", "0")]),
        ("disk", [("gib-days:gp3", "100", "0.003"), ("requests:gp3", "5", "0")]),
        ("load-balancer", [("hours:balancer", "24", "0.02"), ("gib:balancer", "50", "0.01")]),
        ("storage", [("gib-days:standard", "100", "0.001")]),
    ],
)
def test_what_is_used_is_left_alone(service: str, usage: list[tuple[str, str, str]]) -> None:
    assert savings.find(charges(usage, service=service)) == []


def test_few_days_make_less_sure() -> None:
    [finding] = savings.find(charges([("gib-days:gp3", "100", "0.003")], service="disk", days=7))
    assert finding.confidence == Decimal("0.5")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("2026-10-01,prod,compute,eu,i-1,hours:m5.xlarge,24,0.096", "it has 8 columns, the header has 9"),
        ("yesterday,prod,compute,eu,i-1,hours:m5.xlarge,24,0.096,2.304", "date is 'yesterday'"),
        ("2026-10-01,prod,compute,eu,,hours:m5.xlarge,24,0.096,2.304", "resource_id is empty"),
        ("2026-10-01,prod,compute,eu,i-1,hours:m5.xlarge,many,0.096,2.304", "quantity is 'many', not a number"),
        ("2026-10-01,prod,compute,eu,i-1,hours:m5.xlarge,NaN,0.096,2.304", "quantity is 'NaN'"),
        ("2026-10-01,prod,compute,eu,i-1,hours:m5.xlarge,-24,0.096,2.304", "quantity is '-24'"),
        ("2026-10-01,prod,compute,eu,i-1,hours:m5.xlarge,24,0.096,9.99", "cost is 9.99, but quantity times unit_price"),
        ('2026-10-01,"prod,compute', "it is not CSV"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "broken.csv"
    path.write_text("\n".join([HEADER, GOOD, GOOD, line, GOOD]) + "\n")
    with pytest.raises(ToolError) as told:
        tools.read_bill(str(path))
    assert told.value.reason == "BILL_MALFORMED"
    assert told.value.message.startswith(f"broken.csv, line {told.value.metadata['line']}: ")
    assert fault in told.value.message
    if "not CSV" not in fault:
        assert told.value.metadata["line"] == "4"


@pytest.mark.parametrize(
    ("text", "fault"),
    [("", "the columns are missing"), ("a,b\n1,2\n", "the columns are a,b"), (HEADER + "\n", "there is no line")],
)
def test_a_file_that_is_no_bill_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "broken.csv").write_text(text)
    with pytest.raises(BillError, match=fault):
        list(read_charges(tmp_path / "broken.csv"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"none\.csv.*can't be read"):
        tools.read_bill(str(tmp_path / "none.csv"))
