"""The console's files, read once at the start and served from memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from aiohttp import hdrs, web
from mainspring_kit.config import SettingsError

FILES: Final = web.AppKey("console_files", Mapping)

_INDEX: Final = "index.html"
_MEDIA_TYPES: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class File:
    """A file of the console."""

    body: bytes
    media_type: str
    tag: str


def read_files() -> Mapping[str, File]:
    """The console's files by name: as installed beside this module, or in the checkout."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "console", here.parents[2] / "console"):
        if (folder / _INDEX).is_file():
            paths = [path for path in folder.iterdir() if path.suffix in _MEDIA_TYPES]
            return {path.name: _read(path) for path in paths}
    raise SettingsError("The console's files are missing from this installation: install the package again.")


async def show_file(request: web.Request) -> web.Response:
    """`GET /` and `GET /console/{name}`."""
    file = request.app[FILES].get(request.match_info.get("name", _INDEX))
    if file is None:
        raise web.HTTPNotFound
    headers = {hdrs.ETAG: f'"{file.tag}"', hdrs.CACHE_CONTROL: "no-cache", "Content-Security-Policy": _POLICY}
    if request.headers.get(hdrs.IF_NONE_MATCH) == headers[hdrs.ETAG]:
        return web.Response(status=304, headers=headers)
    return web.Response(body=file.body, content_type=file.media_type, charset="utf-8", headers=headers)


def _read(path: Path) -> File:
    body = path.read_bytes()
    return File(body, _MEDIA_TYPES[path.suffix], sha256(body).hexdigest()[:16])
