"""Messages as values of proto3 JSON, by a plan that is made once for each type. It knows no type of ours, and writes no bytes.

protobuf's own converter looks everything about every field up anew for every message; that was half of what the events of an answer cost
besides their tokens. Types with a JSON form of their own (google.protobuf…) are left to it.

Source: https://protobuf.dev/programming-guides/json/
"""

import base64
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

Convert = Callable[[Any], Any]
Put = Callable[[Any, dict[str, Any]], None]
"""Puts one field of a message into an object."""


def plain(message: Message) -> dict[str, Any]:
    """`message` by our field names: int64 as strings, and every field that has no presence, also with its default."""
    plan = _plans.get(type(message))
    if plan is None:
        if _has_own_form(message.DESCRIPTOR):
            return _protobufs_own(message)  # type: ignore[no-any-return]
        # One for each type of the contract, so there is a bound.
        fields: Any = message.DESCRIPTOR.fields
        plan = _plans[type(message)] = [_put(field) for field in fields]
    value: dict[str, Any] = {}
    for put in plan:
        put(message, value)
    return value


_plans: dict[type[Message], list[Put]] = {}


def _put(field: FieldDescriptor) -> Put:
    name, convert, entry = field.name, _convert(field), field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        of_value = _convert(entry.fields_by_name["value"])
        return lambda message, value: value.__setitem__(name, _map(getattr(message, name), of_value))
    if field.is_repeated:
        if convert is None:
            return lambda message, value: value.__setitem__(name, list(getattr(message, name)))
        return lambda message, value: value.__setitem__(name, [convert(item) for item in getattr(message, name)])
    if field.has_presence:
        as_it_is = convert or (lambda item: item)

        def put_if_there(message: Any, value: dict[str, Any]) -> None:
            if message.HasField(name):
                value[name] = as_it_is(getattr(message, name))

        return put_if_there
    if convert is None:
        return lambda message, value: value.__setitem__(name, getattr(message, name))
    return lambda message, value: value.__setitem__(name, convert(getattr(message, name)))


def _map(entries: Mapping[Any, Any], convert: Convert | None) -> dict[str, Any]:
    return {_key(key): entries[key] if convert is None else convert(entries[key]) for key in entries}


def _key(key: object) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)


def _convert(field: FieldDescriptor) -> Convert | None:
    """How a single value of `field` is written; None = as it is."""
    if field.message_type is not None:
        return _protobufs_own if _has_own_form(field.message_type) else plain
    if field.enum_type is not None:
        return _named(field.enum_type)
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_INT64 | FieldDescriptor.CPPTYPE_UINT64:
            return str
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return _double
        case FieldDescriptor.CPPTYPE_FLOAT:
            return _single
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return _base64
    return None


def _has_own_form(descriptor: Any) -> bool:
    return str(descriptor.full_name).startswith("google.protobuf.")


def _protobufs_own(message: Message) -> Any:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _double(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _single(value: float) -> float | str:
    """The shortest number that is this one in single precision."""
    if not math.isfinite(value):
        return _double(value)
    for digits in range(6, 9):
        if (short := float(f"{value:.{digits}g}")) == value or struct.unpack("f", struct.pack("f", short))[0] == value:
            return short
    return float(f"{value:.9g}")


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _named(enum: EnumDescriptor) -> Convert:
    names = {value.number: value.name for value in enum.values}
    return lambda number: names.get(number, number)
