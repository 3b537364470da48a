"""The data folder of a local stack: one holder, secrets of its own, sockets within the system's limit."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from mainspring.dev.folder import Folder, write_whole
from mainspring.embedded.launch import StartError


def test_a_second_holder_is_told_who_the_first_one_is(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data")
    with folder.lock("http://127.0.0.1:8080"), pytest.raises(StartError) as told, Folder(tmp_path / "data").lock("x"):
        pass
    holder = json.loads(f'{{"pid": {str(told.value).split("process ")[1].split(",")[0]}}}')
    assert holder["pid"] > 1
    assert "http://127.0.0.1:8080" in str(told.value)
    assert "--data-dir" in str(told.value)


def test_a_folder_is_held_only_while_somebody_holds_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert not folder.is_held()
    with folder.lock("http://127.0.0.1:1"):
        assert Folder(tmp_path).is_held()
    assert not folder.is_held()


def test_the_ready_file_goes_with_its_holder(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with folder.lock("http://127.0.0.1:1"):
        write_whole(folder.ready_file, "{}")
    assert not folder.ready_file.exists()


def test_nothing_of_the_folder_gets_into_a_repository(tmp_path: Path) -> None:
    with Folder(tmp_path).lock("http://127.0.0.1:1"):
        assert (tmp_path / ".gitignore").read_text() == "*\n"


def test_secrets_stay_the_same_and_are_for_development(tmp_path: Path) -> None:
    first, second = Folder(tmp_path).secrets(), Folder(tmp_path).secrets()
    assert first == second
    assert first.auth != first.service
    assert first.auth.startswith("dev-")
    assert len(first.service) >= 32
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600


def test_secrets_that_are_not_usable_are_named(tmp_path: Path) -> None:
    (tmp_path / "secrets.json").write_text("[]")
    with pytest.raises(StartError, match=r"secrets\.json is not usable"):
        Folder(tmp_path).secrets()


def test_sockets_of_a_deep_folder_go_where_their_path_is_short_enough(tmp_path: Path) -> None:
    deep = Folder(tmp_path / ("d" * 100))
    assert Folder(tmp_path / "x").sockets() == tmp_path / "x" / "run"
    assert stat.S_IMODE((tmp_path / "x" / "run").stat().st_mode) == 0o700
    assert len(str(deep.sockets() / ".s.PGSQL.5432")) < 104
    assert deep.sockets() == deep.sockets() != Folder(tmp_path / ("e" * 100)).sockets()


def test_a_short_folder_goes_with_its_holder(tmp_path: Path) -> None:
    deep = Folder(tmp_path / ("d" * 100))
    with deep.lock("http://127.0.0.1:1"):
        sockets = deep.sockets()
        assert sockets.is_dir()
    assert not sockets.exists()


def test_noted_pids_come_back(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.noted_pids() == {}
    folder.note_pids({12: 1_700_000_000.25})
    assert Folder(tmp_path).noted_pids() == {12: 1_700_000_000.25}


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="can't be made"), Folder(tmp_path / "file" / "data").lock("x"):
        pass
