"""The models file: read, checked and watched. What its tiers mean for a question is decided in `router`, not here."""

import asyncio
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import structlog
from msgspec import Meta

from services.orchestrator.domain import Candidate, Capability
from services.orchestrator.router import EXTRACTIVE, Router, Table, Tier

log = structlog.get_logger(__name__)

MODELS_FILE = Path(__file__).parent / "models.toml"
FILE_BYTES_MAX = 1024 * 1024
MODELS_MAX, TIERS_MAX = 1000, 500
LOOK_S = 1.0
"""How often the file is looked at. Polling a time stamp also sees files that are mounted, where events of the file system do not arrive."""

_Name = Annotated[str, Meta(min_length=1, max_length=128)]
_TierName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]
_Tokens = Annotated[int, Meta(ge=1, le=10_000_000)]


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    model: _Name
    provider: _Name
    context_tokens_max: _Tokens
    output_tokens_max: _Tokens
    capabilities: list[Capability] = []


class _Weighted(msgspec.Struct, forbid_unknown_fields=True):
    model: _Name
    weight: Annotated[float, Meta(gt=0, le=1000)]


class _Shadow(msgspec.Struct, forbid_unknown_fields=True):
    tier: _TierName
    share: Annotated[float, Meta(ge=0, le=1)]


class _Tier(msgspec.Struct, forbid_unknown_fields=True, rename={"continues": "continue", "holds_back": "hold_back"}):
    models: Annotated[list[_Name | _Weighted], Meta(min_length=1, max_length=32)] | None = None
    plans: Annotated[list[_Name], Meta(max_length=100)] = []
    prompt_tokens_max: _Tokens | None = None
    output_tokens_max: _Tokens | None = None
    escalate_to: _TierName = ""
    cheaper: _TierName = ""
    continues: bool = False
    holds_back: bool = False
    shadow: _Shadow | None = None
    easy: _TierName = ""
    hard: _TierName = ""
    difficulty: Annotated[float, Meta(ge=0, le=1)] = 0.5


class _File(msgspec.Struct, forbid_unknown_fields=True):
    models: Annotated[list[_Model], Meta(min_length=1, max_length=MODELS_MAX)]
    tiers: Annotated[dict[_TierName, Any], Meta(min_length=1, max_length=TIERS_MAX)]
    """Each is checked by itself, so that a mistake is told with the name of its tier."""
    providers: list[Any] = []
    """Read and checked by whoever speaks to them."""


_Form = TypeVar("_Form", bound=msgspec.Struct)


class ModelsFileInvalid(ValueError):
    """The file cannot be used. The text names the file, the place in it and the bound."""


def read_table(path: Path = MODELS_FILE) -> Table:
    """Read and check the file. Raises ModelsFileInvalid."""
    try:
        with path.open("rb") as opened:
            content = opened.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise _invalid(path, f"it has more than {FILE_BYTES_MAX} bytes")
        return table_of(tomllib.loads(content.decode("utf-8-sig")), path)
    except OSError as error:
        raise _invalid(path, f"it cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid(path, str(error)) from error  # tomllib names line and column
    except RecursionError as error:
        raise _invalid(path, "it is nested too deeply") from error


def table_of(content: dict[str, Any], path: Path = MODELS_FILE) -> Table:
    """Check what the file says. Raises ModelsFileInvalid."""
    file = _checked(path, "", content, _File)
    names = [row.model for row in file.models]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise _invalid(path, f"models: {', '.join(doubled)} is there more than once")
    if EXTRACTIVE not in names:
        raise _invalid(path, f"models: {EXTRACTIVE!r} is missing; it serves tiers of which no provider is configured")
    tiers = {name: _tier(path, name, _checked(path, f"tiers.{name}: ", row, _Tier)) for name, row in file.tiers.items()}
    for name, tier in tiers.items():
        if missing := sorted({model for model, _ in tier.models} - set(names)):
            raise _invalid(path, f"tiers.{name}.models: there is no model {', '.join(missing)}")
        for key in ("escalate_to", "cheaper", "easy", "hard", "shadow"):
            other = getattr(tier, key)
            if other and (other not in tiers or other == name or not tiers[other].models):
                raise _invalid(path, f"tiers.{name}.{key}: {other!r} is no other tier with models")
    return Table(
        tuple(
            Candidate(row.provider, row.model, row.context_tokens_max, row.output_tokens_max, frozenset(row.capabilities))
            for row in file.models
        ),
        tiers,
    )


def _checked(path: Path, place: str, content: Any, form: type[_Form]) -> _Form:
    try:
        return msgspec.convert(content, form)
    except msgspec.ValidationError as error:
        raise _invalid(path, place + str(error).replace("`$.", "`")) from error  # msgspec names key and bound


def _tier(path: Path, name: str, row: _Tier) -> Tier:
    if (row.models is None) != bool(row.easy and row.hard) or bool(row.easy) != bool(row.hard):
        raise _invalid(path, f"tiers.{name}: needs either `models`, or `easy` and `hard`")
    models = [(entry, 0.0) if isinstance(entry, str) else (entry.model, entry.weight) for entry in row.models or []]
    if len({bool(weight) for _, weight in models}) > 1:
        raise _invalid(path, f"tiers.{name}.models: either all have a weight or none")
    if len({model for model, _ in models}) < len(models):
        raise _invalid(path, f"tiers.{name}.models: a model is there more than once")
    return Tier(
        models=tuple(models),
        plans=frozenset(row.plans),
        prompt_tokens_max=row.prompt_tokens_max,
        output_tokens_max=row.output_tokens_max,
        escalate_to=row.escalate_to,
        cheaper=row.cheaper,
        continues=row.continues,
        holds_back=row.holds_back,
        shadow=row.shadow.tier if row.shadow else "",
        shadow_share=row.shadow.share if row.shadow else 0.0,
        easy=row.easy,
        hard=row.hard,
        difficulty=row.difficulty,
    )


def _invalid(path: Path, what: str) -> ModelsFileInvalid:
    return ModelsFileInvalid(f"{path.name}: {what}")


def tell_left_out(router: Router, named: Collection[str] = ()) -> None:
    """Say of which models nothing can be asked, and why. `named`: providers that a file names which was read after the start."""
    for provider in sorted({model.provider for model in router.left_out}):
        models = ", ".join(model.model for model in router.left_out if model.provider == provider)
        if provider in named:
            log.warning("models_left_out", provider=provider, models=models, why="[[providers]] is read at start: restart to use it")
        else:
            log.info("models_left_out", provider=provider, models=models, why="the provider is not configured")


async def reload_forever(router: Router, path: Path, providers_in: Callable[[Path], Collection[str]], look_s: float = LOOK_S) -> None:
    """Let `router` adopt the file whenever it has changed. A file that cannot be used is told of once, and what was before stays.

    `providers_in` checks the file's providers, raising ValueError, and names them.
    """
    seen = _stamp(path)
    while True:
        await asyncio.sleep(look_s)
        if (stamp := _stamp(path)) == seen:
            continue
        seen = stamp
        try:
            table, named = await asyncio.to_thread(lambda: (read_table(path), providers_in(path)))
            router.adopt(table)
        except ValueError as error:
            log.error("models_file_refused", why=str(error))
        else:
            log.info("models_file_adopted")
            tell_left_out(router, named)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does, also when it is replaced; None while it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
