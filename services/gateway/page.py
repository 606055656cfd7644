"""The built web page out of memory. Only files that were there at the start are served, so no path of a request ever reaches the disk."""

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from services.chassis.errors import NotFound
from services.gateway.browser import API_POLICY
from services.gateway.exchange import Exchange

STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
NOT_BUILT = b"<!doctype html><title>Tailrace</title><p>The page is not part of this installation. The API is at /v1."
_TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".woff2": "font/woff2",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file as it is sent."""

    body: bytes
    media_type: bytes
    etag: bytes
    immutable: bool
    """Its name changes with its content."""


class Page:
    """Assets by path."""

    def __init__(self, root: Path = STATIC) -> None:
        files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else []
        self._assets = {f"/{path.relative_to(root).as_posix()}": _asset(path, root) for path in files}
        self._assets["/"] = self._assets.get("/index.html") or Asset(NOT_BUILT, b"text/html; charset=utf-8", b'"not-built"', False)

    def has(self, path: str) -> bool:
        return path in self._assets

    async def serve(self, exchange: Exchange, path: str) -> None:
        """Send the asset at `path`. Raises NotFound."""
        asset = self._assets.get(path)
        if asset is None:
            raise NotFound("there is nothing here", kind="page")
        lifetime = b"public, max-age=31536000, immutable" if asset.immutable else b"no-cache"
        headers = [(b"etag", asset.etag), (b"cache-control", lifetime)]
        is_page = asset.media_type.startswith(b"text/html")
        headers.append((b"content-security-policy", POLICY.encode()) if is_page else API_POLICY)
        if asset.etag in (tag.strip().encode() for tag in exchange.header("if-none-match").split(",")):
            await exchange.respond(304, b"", asset.media_type, headers)
        else:
            await exchange.respond(200, asset.body, asset.media_type, headers)


def _asset(path: Path, root: Path) -> Asset:
    body = path.read_bytes()
    media_type = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    if media_type.startswith("text/"):
        media_type += "; charset=utf-8"
    digest = hashlib.sha256(body).hexdigest()[:32]
    return Asset(body, media_type.encode(), f'"{digest}"'.encode(), path.relative_to(root).parts[0] == "assets")
