"""A provider's usage export as rows, read piece by piece: JSON of the usage APIs and CSV of the consoles. Pure; nothing is compared here.

Shapes: Anthropic's messages usage report (buckets with `starting_at`) and console CSV (`usage_date_utc`, `model_version`, …); OpenAI's
completions usage (buckets with `start_time`) and CSV with the same names. Cells of a file that others wrote are never believed.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, TextIO

from services.chassis.errors import RequestInvalid
from services.chassis.money import Usage
from services.ledger.prices import NANOUSD

LINE_CHARACTERS_MAX = 64 * 1024
BUCKET_CHARACTERS_MAX = 4 * 1024 * 1024
"""One bucket of JSON: some ten thousand results."""
PIECE_CHARACTERS = 64 * 1024
_COUNT = re.compile(r"\d{1,15}", re.ASCII)
_USD = re.compile(r"\d{1,9}(\.\d{1,12})?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}", re.ASCII)
_DATA = re.compile(r'"data"\s*:\s*\[')
_SPACE = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class ExportRow:
    """What a provider says was used in [start, end), or by one request."""

    line: int
    provider: str
    model: str
    """Empty = the provider says that nothing was used then."""
    start: datetime
    end: datetime
    usage: Usage
    cost_nanousd: int | None = None
    """None if the export has no cost."""
    request_id: str = ""


def csv_rows(file: TextIO) -> Iterator[ExportRow]:
    """Rows of a CSV export with a header. Raises RequestInvalid with the line."""
    reader = csv.reader(_lines(file), strict=True)
    try:
        header = [name.strip().lower().lstrip("\ufeff") for name in next(reader, [])]
        made = _shape(header)
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise _refused(reader.line_num, f"has {len(cells)} cells, the header {len(header)}")
            yield made(reader.line_num, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise _refused(reader.line_num, f"is not CSV: {error}") from error


def json_rows(file: TextIO) -> Iterator[ExportRow]:
    """Rows of one or more pages of a usage API. Raises RequestInvalid with the line."""
    for line, bucket in _buckets(file):
        results = bucket.get("results")
        if not isinstance(results, list):
            raise _refused(line, "has a bucket without results")
        if not results:
            yield _silence(line, bucket)
        for result in results:
            if not isinstance(result, dict):
                raise _refused(line, "has a result that is no object")
            if "starting_at" in bucket:
                written = result.get("cache_creation") or {}
                if not isinstance(written, dict):
                    raise _refused(line, "has a cache_creation that is no object")
                cells = {**result, **{f"cache_creation_{name}": value for name, value in written.items()}, **_times(bucket)}
                yield _anthropic_api(line, cells)
            else:
                yield _openai(line, {**result, **_times(bucket)})


def _silence(line: int, bucket: Mapping[str, Any]) -> ExportRow:
    """A bucket without results."""
    if "starting_at" in bucket:
        provider, start, end = "anthropic", bucket["starting_at"], bucket.get("ending_at")
    else:
        provider, start, end = "openai", bucket.get("start_time"), bucket.get("end_time")
    return ExportRow(line, provider, "", *_period(line, start, end), Usage())


def _times(bucket: Mapping[str, Any]) -> dict[str, Any]:
    return {name: bucket.get(name) for name in ("starting_at", "ending_at", "start_time", "end_time") if name in bucket}


def _lines(file: TextIO) -> Iterator[str]:
    """Lines of bounded length."""
    number = 0
    while line := file.readline(LINE_CHARACTERS_MAX + 1):
        number += 1
        if len(line) > LINE_CHARACTERS_MAX:
            raise _refused(number, f"is longer than {LINE_CHARACTERS_MAX} characters")
        yield line


def _buckets(file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """The elements of every `data` array, each with the line it begins on. Never more than one of them is held."""
    decoder = json.JSONDecoder(parse_constant=_no_constant, parse_float=Decimal)
    held, line, inside, found = "", 1, False, False
    while True:
        piece = file.read(PIECE_CHARACTERS)
        held += piece
        while True:
            if not inside:
                if not (match := _DATA.search(held)):
                    break
                line, held, inside, found = line + held.count("\n", 0, match.end()), held[match.end() :], True, True
            space = _SPACE.match(held)
            assert space is not None
            line, held = line + held.count("\n", 0, space.end()), held[space.end() :]
            if held.startswith("]"):
                inside = False
                continue
            try:
                bucket, end = decoder.raw_decode(held)
            except json.JSONDecodeError as error:
                if not piece or len(held) > BUCKET_CHARACTERS_MAX:
                    raise _refused(line, f"is not JSON: {error.msg}") from error
                break
            except (ValueError, RecursionError) as error:
                raise _refused(line, "is not JSON that can be used") from error
            if not isinstance(bucket, dict):
                raise _refused(line, "has a bucket that is no object")
            yield line, bucket
            line, held = line + held.count("\n", 0, end), held[end:]
        if not piece:
            break
        if not inside and len(held) > PIECE_CHARACTERS:
            kept = held[-64:]  # `"data": [` may be cut in two
            line, held = line + held.count("\n") - kept.count("\n"), kept
    if inside or not found:
        raise _refused(line, "ends before its data do" if found else "has no `data`: it is no page of a usage API")


def _no_constant(name: str) -> None:
    raise ValueError(name)


Make = Callable[[int, Mapping[str, Any]], ExportRow]


def _shape(header: list[str]) -> Make:
    if {"usage_date_utc", "model_version", "usage_input_tokens_no_cache", "usage_output_tokens"} <= set(header):
        return _anthropic_csv
    if "model" in header and {"start_time", "input_tokens", "output_tokens"} <= set(header):
        return _openai
    raise _refused(1, "is the header of no export that is known")


def _anthropic_csv(line: int, cells: Mapping[str, Any]) -> ExportRow:
    start, end = _period(line, cells["usage_date_utc"], cells.get("usage_end_utc"))
    hour = _count(line, cells, "usage_input_tokens_cache_write_1h")
    usage = Usage(
        _count(line, cells, "usage_input_tokens_no_cache"),
        _count(line, cells, "usage_output_tokens"),
        _count(line, cells, "usage_input_tokens_cache_read"),
        _count(line, cells, "usage_input_tokens_cache_write_5m") + hour,
        hour,
    )
    return ExportRow(line, "anthropic", _name(line, cells, "model_version"), start, end, usage, *_cost_and_id(line, cells))


def _anthropic_api(line: int, cells: Mapping[str, Any]) -> ExportRow:
    start, end = _period(line, cells["starting_at"], cells.get("ending_at"))
    hour = _count(line, cells, "cache_creation_ephemeral_1h_input_tokens")
    usage = Usage(
        _count(line, cells, "uncached_input_tokens"),
        _count(line, cells, "output_tokens"),
        _count(line, cells, "cache_read_input_tokens"),
        _count(line, cells, "cache_creation_ephemeral_5m_input_tokens") + hour,
        hour,
    )
    return ExportRow(line, "anthropic", _name(line, cells, "model"), start, end, usage, *_cost_and_id(line, cells))


def _openai(line: int, cells: Mapping[str, Any]) -> ExportRow:
    """Its input tokens contain those that were read from its cache and those that were written to it."""
    start, end = _period(line, cells.get("start_time"), cells.get("end_time"))
    read, written = _count(line, cells, "input_cached_tokens"), _count(line, cells, "input_cache_write_tokens")
    plain = _count(line, cells, "input_tokens") - read - written
    if plain < 0:
        raise _refused(line, "has more cached tokens than input tokens")
    usage = Usage(plain, _count(line, cells, "output_tokens"), read, written)
    return ExportRow(line, "openai", _name(line, cells, "model"), start, end, usage, *_cost_and_id(line, cells))


def _cost_and_id(line: int, cells: Mapping[str, Any]) -> tuple[int | None, str]:
    cost, request_id = cells.get("cost_usd"), cells.get("request_id")
    if cost not in (None, "") and not _USD.fullmatch(str(cost)):
        raise _refused(line, "has a cost_usd that is no amount")
    nanousd = round(Decimal(str(cost)) * NANOUSD) if cost not in (None, "") else None
    return nanousd, _name(line, cells, "request_id") if request_id not in (None, "") else ""


def _count(line: int, cells: Mapping[str, Any], name: str) -> int:
    """A count of tokens; one that is not there is 0. A bool, a fraction, a sign, NaN or a formula is none."""
    value = cells.get(name)
    if value is None or value == "":
        return 0
    if isinstance(value, bool) or not isinstance(value, int | str) or not _COUNT.fullmatch(str(value)):
        raise _refused(line, f"has no count of tokens in {name}")
    return int(value)


def _name(line: int, cells: Mapping[str, Any], name: str) -> str:
    value = cells.get(name)
    if not isinstance(value, str) or not _NAME.fullmatch(value.strip()):
        raise _refused(line, f"has no name in {name}; group the export by model")
    return value.strip()


def _period(line: int, start: Any, end: Any) -> tuple[datetime, datetime]:
    """Without an end, a date is a day and a time an hour."""
    begun = _moment(line, start)
    length = (
        timedelta(days=1) if isinstance(start, str) and len(start.strip()) == 10 and not start.strip().isdecimal() else timedelta(hours=1)
    )
    ended = _moment(line, end) if end not in (None, "") else begun + length
    if not begun < ended <= begun + timedelta(days=31):
        raise _refused(line, "has a period that is none")
    return begun, ended


def _moment(line: int, value: Any) -> datetime:
    """Seconds since 1970, or ISO 8601, in UTC unless it says otherwise."""
    try:
        if isinstance(value, int) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
        text = str(value).strip()
        if text.isdecimal() and text.isascii():
            return datetime.fromtimestamp(int(text), UTC)
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise _refused(line, "has a time that is none") from error


def _refused(line: int, why: str) -> RequestInvalid:
    return RequestInvalid(f"line {line} {why}", field=f"line {line}")
