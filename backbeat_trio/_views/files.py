"""The dashboard's static files, read and compressed once when it starts."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final, final

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from .access import Problem

_INDEX: Final = "index.html"
_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "ico": "image/x-icon",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "map": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
    "webmanifest": "application/manifest+json",
    "woff2": "font/woff2",
}
_OTHER: Final = "text/plain; charset=utf-8"
# What is smaller fits into a packet either way.
_COMPRESS_FROM: Final = 1024


class _File(Struct, frozen=True):
    media: str
    tag: str
    plain: bytes
    compressed: bytes | None


@final
class Files:
    """The static files.

    They are found by their names only, so no path can lead out of the folder.

    Args:
      folder: where they lie; None is the package's own folder.

    """

    def __init__(self, folder: Traversable | None = None) -> None:
        folder = folder or resources.files(__package__).joinpath("static")
        self._files: Mapping[str, _File] = dict(_read(folder)) if folder.is_dir() else {}

    async def index(self, request: Request) -> Response:
        """Answer with the page itself."""
        return self._answer(_INDEX, request)

    async def static(self, request: Request) -> Response:
        """Answer with the file that the path names."""
        return self._answer(request.path_params["name"], request)

    def _answer(self, name: str, request: Request) -> Response:
        file = self._files.get(name)
        if file is None:
            raise Problem(404, "there is no such page")
        headers = {"Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
        body, tag = file.plain, file.tag
        if file.compressed is not None and _accepts_gzip(request):
            body, tag = file.compressed, f"{file.tag}-gzip"
            headers["Content-Encoding"] = "gzip"
        headers["ETag"] = f'"{tag}"'
        known = request.headers.get("if-none-match", "")
        tags = {each.strip().removeprefix("W/") for each in known.split(",")}
        if tags & {"*", f'"{tag}"'}:
            headers.pop("Content-Encoding", None)
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=file.media)


def _read(folder: Traversable, prefix: str = "") -> list[tuple[str, _File]]:
    found = []
    for item in folder.iterdir():
        if item.is_dir():
            found += _read(item, f"{prefix}{item.name}/")
        elif not item.name.startswith("."):
            plain = item.read_bytes()
            suffix = item.name.rpartition(".")[2].lower()
            compressed = None
            if len(plain) >= _COMPRESS_FROM:
                compressed = gzip.compress(plain, mtime=0)
            if compressed is not None and len(compressed) > 0.9 * len(plain):
                # Pictures and fonts are compressed already.
                compressed = None
            tag = hashlib.sha256(plain).hexdigest()[:32]
            file = _File(_TYPES.get(suffix, _OTHER), tag, plain, compressed)
            found.append((prefix + item.name, file))
    return found


def _accepts_gzip(request: Request) -> bool:
    for each in request.headers.get("accept-encoding", "").split(","):
        name, _, quality = each.partition(";")
        if name.strip().lower() == "gzip":
            return quality.strip().replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
