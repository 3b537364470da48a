"""gRPC ignores an option that it does not know, without a word: each that the product sets is one that it has."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest

pytestmark = pytest.mark.unit

ROOT: Final = Path(__file__).resolve().parents[3]
OPTION: Final = re.compile(r'"(grpc\.[a-z0-9_.]+)"')


def test_every_option_is_one_that_grpc_knows() -> None:
    sources = [path for root in ("sdk", "services", "gateway") for path in (ROOT / root).rglob("*.py")]
    named = {name for path in sources if path.parent.name != "v1" for name in OPTION.findall(path.read_text())}
    library = find_spec("grpc._cython.cygrpc")
    assert library is not None
    assert library.origin is not None
    known = Path(library.origin).read_bytes()
    assert "grpc.keepalive_time_ms" in named
    assert [name for name in sorted(named) if name.encode() + b"\0" not in known] == []
