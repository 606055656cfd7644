"""Our JSON of a message is protobuf's own, for every type of the contract and whatever is in it."""

import json
import random
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from services.gateway.proto_json import plain
from tailrace.common.v1 import common_pb2
from tailrace.gateway.v1 import gateway_service_pb2
from tailrace.ledger.v1 import ledger_service_pb2
from tailrace.orchestrator.v1 import orchestrator_service_pb2
from tailrace.retrieval.v1 import retrieval_service_pb2

FILES = (common_pb2, gateway_service_pb2, ledger_service_pb2, orchestrator_service_pb2, retrieval_service_pb2)
TYPES = [message for file in FILES for message in file.DESCRIPTOR.message_types_by_name.values()]
SEED = 20261127
SCALARS: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_INT32: (0, 1, -1, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_INT64: (0, 1, -1, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: (0.0, -0.0, 1.0, 0.1, 1e300, 5e-324, float("inf"), float("-inf"), float("nan")),
    FieldDescriptor.CPPTYPE_FLOAT: (0.0, 0.1, 1 / 3, 16777217.0, 1.17549435e-38, float("inf"), float("nan")),
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 99),
}
STRINGS = ("", "a", "línea\n\r\0\u2028", "𝛑 'quoted' \"twice\"", "x" * 300)


def some(message: Any, descriptor: Descriptor, chance: random.Random, depth: int = 0) -> None:
    """Put random things into some of the fields."""
    for field in descriptor.fields:
        if chance.random() < 0.25:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entries, of_value = getattr(message, field.name), field.message_type.fields_by_name["value"]
            for key in chance.sample(STRINGS, 2):
                if of_value.message_type is None:
                    entries[key] = scalar(of_value, chance)
                elif depth < 3:
                    some(entries[key], of_value.message_type, chance, depth + 1)
        elif field.message_type is not None:
            if depth >= 3 or (field.message_type.full_name.startswith("google.protobuf.") and not hand_over(message, field, chance)):
                continue
            if field.is_repeated:
                for _ in range(chance.randrange(3)):
                    some(getattr(message, field.name).add(), field.message_type, chance, depth + 1)
            elif not field.message_type.full_name.startswith("google.protobuf."):
                getattr(message, field.name).SetInParent()
                some(getattr(message, field.name), field.message_type, chance, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(scalar(field, chance) for _ in range(chance.randrange(4)))
        else:
            setattr(message, field.name, scalar(field, chance))


def hand_over(message: Any, field: FieldDescriptor, chance: random.Random) -> bool:
    """Fill one of protobuf's own types by its own means; False once that is done."""
    if not field.is_repeated:
        of_ours = getattr(message, field.name)
        match field.message_type.name:
            case "Timestamp":
                of_ours.FromMilliseconds(chance.randrange(2**41))
            case "Struct":
                of_ours.update({"a": [1.5, None, {"b": True}], "c": "text"})
            case "Value":
                of_ours.string_value = "text"
            case _:
                of_ours.SetInParent()
    return False


def scalar(field: FieldDescriptor, chance: random.Random) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        text = chance.choice(STRINGS)
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    return chance.choice(SCALARS[field.cpp_type])


@pytest.mark.parametrize("descriptor", TYPES, ids=lambda descriptor: descriptor.full_name.removeprefix("tailrace."))
def test_every_type_is_written_as_protobuf_writes_it(descriptor: Descriptor) -> None:
    """Compared as bytes of JSON with sorted keys, so that 1 and 1.0, and NaN and its name, are different things."""
    chance, make = random.Random(f"{SEED} {descriptor.full_name}"), message_factory.GetMessageClass(descriptor)
    for round_ in range(12):
        message = make()
        if round_:
            some(message, descriptor, chance)
        expected = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

        assert json.dumps(plain(message), sort_keys=True) == json.dumps(expected, sort_keys=True)


def test_a_type_with_a_form_of_its_own_keeps_it() -> None:
    """What a Struct holds is the object, not how protobuf keeps it."""
    struct = Struct()
    struct.update({"a": [1.5, None, {"b": True}]})

    assert plain(struct) == {"a": [1.5, None, {"b": True}]}
