"""The rules of the SQL: where it stands, that it is used, and that every table is closed to strangers."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Final

import pytest

from tests.tidy.source import ROOT, Module, called, modules, written

pytestmark = pytest.mark.tidy

STATEMENT: Final = re.compile(
    r"^\s*(SELECT\s|INSERT\s+INTO\s|UPDATE\s+\S+\s+SET\s|DELETE\s+FROM\s|WITH\s+\w+\s+AS\s|MERGE\s+INTO\s|TRUNCATE\s"
    r"|(CREATE|ALTER|DROP)\s+(TABLE|ROLE|SCHEMA|INDEX|FUNCTION|POLICY|DATABASE)\s|SET\s+LOCAL\s|GRANT\s|REVOKE\s)"
)
# The kit's few statements name no table: the user's context, the migration lock, a role's password.
STATEMENTS_IN_CODE: Final = {"services/mainspring_kit/postgres.py"}
HEADER: Final = re.compile(r"^-- (?P<name>[a-z_0-9]+): \S.*$", re.MULTILINE)
FILE_NAME: Final = re.compile(r"(?P<number>\d{4})_[a-z]+_[a-z_0-9]+\.sql")
NAME: Final = r"(?P<name>[a-z_]+\.[a-z_0-9]+)"


def statements_in_code(found: Iterable[Module]) -> list[str]:
    """SQL outside the sql/ folders."""
    return [
        module.offence(node, "SQL belongs in sql/queries.sql, with a name and its purpose")
        for module in found
        if module.path not in STATEMENTS_IN_CODE
        for node in module.nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and STATEMENT.match(node.value)
    ]


def queries_out_of_step(package: str, queries: str, found: Iterable[Module]) -> list[str]:
    """Named statements that no code uses, and names used that no statement has."""
    names = {match["name"] for match in HEADER.finditer(queries)}
    used: set[str] = set()
    mentioned: set[str] = set()
    offences: list[str] = []
    for module in found:
        for node in module.nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                mentioned.add(node.value)
            if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
                continue
            name = str(node.slice.value)
            if re.search(r"(queries|sql)$", called(node.value), re.IGNORECASE):
                used.add(name)
                if name not in names:
                    offences.append(module.offence(node, f"{package} has no statement named {name}"))
    offences.extend(f"{package}: no code uses the statement {name}" for name in sorted(names - used - mentioned))
    return offences


def open_tables(migrations: str) -> list[str]:
    """Tables without forced row-level security or without a policy."""
    text = _without_comments(migrations)
    tables = re.findall(r"CREATE TABLE (?:IF NOT EXISTS )?([a-z_]+\.[a-z_0-9]+)(?! PARTITION OF)\b", text)
    offences = []
    for table in tables:
        if re.search(rf"CREATE TABLE (IF NOT EXISTS )?{re.escape(table)} PARTITION OF", text):
            continue
        altered = " ".join(re.findall(rf"ALTER TABLE {re.escape(table)} ([^;]*);", text))
        for needed in ("ENABLE ROW LEVEL SECURITY", "FORCE ROW LEVEL SECURITY"):
            if needed not in altered:
                offences.append(f"{table}: lacks {needed}")
        if not re.search(rf"CREATE POLICY \S+ ON {re.escape(table)}\b", text):
            offences.append(f"{table}: has no policy")
    return offences


def keys_without_tenant(migrations: str) -> list[str]:
    """Primary keys of tables with a tenant that do not begin with it."""
    offences = []
    for table, body in re.findall(
        r"CREATE TABLE ([a-z_.0-9]+) \((.*?)\)(?: PARTITION BY [^;]*| WITH [^;]*)?;", _without_comments(migrations)
    ):
        key = re.search(r"PRIMARY KEY \(([a-z_]+)", body)
        if "tenant_id" in body and (key is None or key[1] != "tenant_id"):
            offences.append(f"{table}: its primary key must begin with tenant_id")
    return offences


def loose_definers(migrations: str) -> list[str]:
    """SECURITY DEFINER functions whose search_path a caller could choose."""
    text = _without_comments(migrations)
    functions = re.findall(r"CREATE (?:OR REPLACE )?FUNCTION ([a-z_.0-9]+).*?AS (\$\w*\$).*?\2[^;]*;", text)
    heads = re.finditer(r"CREATE (?:OR REPLACE )?FUNCTION ([a-z_.0-9]+)(.*?)(\$\w*\$)(.*?)\3([^;]*);", text)
    assert len(functions) == len(re.findall(r"CREATE (?:OR REPLACE )?FUNCTION ", text)), "a function not understood"
    return [
        f"{head[1]}: SECURITY DEFINER needs SET search_path"
        for head in heads
        if "SECURITY DEFINER" in head[2] + head[5] and "SET search_path" not in head[2] + head[5]
    ]


def disorderly_migrations(files: Mapping[str, str]) -> list[str]:
    """Migrations misnamed, out of sequence, not depending on the one before, or with a way back."""
    offences, before = [], ""
    for number, (name, text) in enumerate(sorted(files.items()), start=1):
        match = FILE_NAME.fullmatch(name)
        if match is None or int(match["number"]) != number:
            offences.append(f"{name}: name it {number:04}_verb_noun.sql")
        depends = re.search(r"^-- depends:[ \t]*(.*)$", text, re.MULTILINE)
        if depends is None or depends[1].strip() != before:
            offences.append(f"{name}: must say `-- depends: {before}`")
        _, _, rollback = text.partition("-- migrate: rollback")
        if _without_comments(rollback).strip():
            offences.append(f"{name}: migrations are forward-only")
        before = name.removesuffix(".sql")
    return offences


def _without_comments(sql: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"--[^\n]*|/\*.*?\*/", "", sql, flags=re.DOTALL))


def _migrations() -> dict[str, dict[str, str]]:
    """Package -> file name -> text."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(ROOT.glob("services/*/sql/migrations/*.sql")):
        found.setdefault(path.parts[-4], {})[path.name] = path.read_text()
    return found


def test_sql_stands_in_its_own_files() -> None:
    assert statements_in_code(modules("services", "gateway")) == []


def test_every_statement_is_used_and_exists() -> None:
    for path in ROOT.glob("services/*/sql/queries.sql"):
        package = path.parts[-3]
        assert queries_out_of_step(package, path.read_text(), modules(f"services/{package}")) == []


def test_every_table_is_closed_to_strangers() -> None:
    for files in _migrations().values():
        assert open_tables("\n".join(files.values())) == []


def test_every_key_begins_with_the_tenant() -> None:
    for files in _migrations().values():
        assert keys_without_tenant("\n".join(files.values())) == []


def test_definers_pin_their_search_path() -> None:
    for files in _migrations().values():
        assert loose_definers("\n".join(files.values())) == []


def test_a_released_migration_is_never_changed() -> None:
    for line in (ROOT / "tests/data/migrations.sha256").read_text().splitlines():
        digest, name = line.split()
        found = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        assert found == digest, f"{name} has been applied to databases already: write another one"


def test_migrations_are_in_order_and_forward_only() -> None:
    for files in _migrations().values():
        assert disorderly_migrations(files) == []


GOOD_TABLE = """
CREATE TABLE state.runs (tenant_id text, run_id uuid, PRIMARY KEY (tenant_id, run_id));
ALTER TABLE state.runs ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON state.runs USING (true);
"""


def test_a_closed_table_is_no_breach() -> None:
    assert open_tables(GOOD_TABLE) == []
    assert keys_without_tenant(GOOD_TABLE) == []


@pytest.mark.parametrize(
    "cut", ["FORCE ROW LEVEL SECURITY", "ENABLE ROW LEVEL SECURITY, ", "CREATE POLICY own ON state.runs"]
)
def test_an_open_table_is_found(cut: str) -> None:
    assert len(open_tables(GOOD_TABLE.replace(cut, "SELECT 1"))) == 1


def test_a_key_without_its_tenant_is_found() -> None:
    assert len(keys_without_tenant(GOOD_TABLE.replace("(tenant_id, run_id)", "(run_id, tenant_id)"))) == 1


def test_a_loose_definer_is_found() -> None:
    function = "CREATE FUNCTION state.f() RETURNS int LANGUAGE sql SECURITY DEFINER {} AS $$ SELECT 1 $$;"
    assert loose_definers(function.format("SET search_path = state")) == []
    assert len(loose_definers(function.format(""))) == 1


def test_sql_in_code_is_found() -> None:
    assert len(statements_in_code([written("services/mainspring_state/store.py", "x = 'SELECT 1 FROM a'")])) == 1


def test_statements_out_of_step_are_found() -> None:
    found = [written("services/mainspring_state/store.py", "a = self._queries['get_run']")]
    assert queries_out_of_step("mainspring_state", "-- get_run: reads one.\nSELECT 1;", found) == []
    assert len(queries_out_of_step("mainspring_state", "-- list_runs: reads all.\nSELECT 1;", found)) == 2


def test_disorderly_migrations_are_found() -> None:
    first = "-- make\n-- depends:\n-- migrate: apply\nSELECT 1;\n-- migrate: rollback\n-- forward only\n"
    assert disorderly_migrations({"0001_make_runs.sql": first}) == []
    assert len(disorderly_migrations({"0002_make_runs.sql": first})) == 1
    assert len(disorderly_migrations({"0001_make_runs.sql": first + "DROP TABLE a;"})) == 1
    assert len(disorderly_migrations({"0001_make_runs.sql": first, "0002_add_tools.sql": first})) == 1
