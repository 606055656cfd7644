"""The contract keeps its own rules: generated code is fresh, every name follows the law, every field says what it means."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
FIELD_OF_FILE, NESTED, ENUM_IN_MESSAGE, FIELD, VALUE, METHOD = 4, 3, 4, 2, 2, 2
SERVICE_OF_FILE, ENUM_OF_FILE = 6, 5
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> list[descriptor_pb2.FileDescriptorProto]:
    """Every file of the contract, with its comments."""
    out = tmp_path_factory.mktemp("descriptors") / "contract.binpb"
    sources = [str(path.relative_to(PROTOS)) for path in sorted(PROTOS.rglob("*.proto"))]
    well_known = resources.files("grpc_tools") / "_proto"
    code = protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", "--include_source_info", f"--descriptor_set_out={out}", *sources])
    assert code == 0
    return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def messages(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], descriptor_pb2.DescriptorProto]]:
    """Every message with its path in the file; the entries of maps are not written by anybody."""

    def walk(
        path: tuple[int, ...], message: descriptor_pb2.DescriptorProto
    ) -> Iterator[tuple[tuple[int, ...], descriptor_pb2.DescriptorProto]]:
        if not message.options.map_entry:
            yield path, message
            for index, inner in enumerate(message.nested_type):
                yield from walk((*path, NESTED, index), inner)

    for index, message in enumerate(file.message_type):
        yield from walk((FIELD_OF_FILE, index), message)


def enums(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], descriptor_pb2.EnumDescriptorProto]]:
    for index, enum in enumerate(file.enum_type):
        yield (ENUM_OF_FILE, index), enum
    for path, message in messages(file):
        for index, enum in enumerate(message.enum_type):
            yield (*path, ENUM_IN_MESSAGE, index), enum


def commented(file: descriptor_pb2.FileDescriptorProto) -> set[tuple[int, ...]]:
    """Paths that a comment stands above."""
    return {tuple(place.path) for place in file.source_code_info.location if place.leading_comments.strip()}


def test_generated_code_is_fresh() -> None:
    """`make proto` would change nothing."""
    run = subprocess.run([sys.executable, str(PROTOS / "generate.py"), "--check"], capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr


def test_every_field_value_and_method_is_documented(contract: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """Who reads the contract needs no other text."""
    bare = []
    for file in contract:
        there = commented(file)
        for path, message in messages(file):
            bare += [f"{message.name}.{field.name}" for index, field in enumerate(message.field) if (*path, FIELD, index) not in there]
        for path, enum in enums(file):
            bare += [value.name for index, value in enumerate(enum.value) if (*path, VALUE, index) not in there]
        for number, service in enumerate(file.service):
            bare += [m.name for index, m in enumerate(service.method) if (SERVICE_OF_FILE, number, METHOD, index) not in there]

    assert bare == []


def test_packages_mirror_folders_and_carry_a_version(contract: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """tailrace/x/v1/x.proto is package tailrace.x.v1."""
    wrong = [file.name for file in contract if file.package != file.name.rpartition("/")[0].replace("/", ".")]

    assert wrong == []
    assert [file.package for file in contract if not re.fullmatch(r"tailrace\.[a-z]+\.v\d+", file.package)] == []


def test_fields_are_in_snake_case(contract: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """One spelling, the one that JSON shows."""
    wrong = [f.name for file in contract for _, message in messages(file) for f in message.field if not SNAKE.fullmatch(f.name)]

    assert wrong == []


def test_enums_begin_unspecified_and_carry_their_name(contract: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """Zero means nobody said; values are not mistaken for another enum's."""
    for file in contract:
        for _, enum in enums(file):
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()

            assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}_UNSPECIFIED", 0)
            assert [value.name for value in enum.value if not value.name.startswith(f"{prefix}_")] == []


def test_services_and_their_messages_are_named_by_the_law(contract: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """XService; each RPC has a request and a response named after it, but for streams of answer events."""
    events = {"AnswerEvent"}
    for file in contract:
        for service in file.service:
            assert service.name.endswith("Service")
            for method in service.method:
                requests, responses = method.input_type.rpartition(".")[2], method.output_type.rpartition(".")[2]
                assert requests == f"{method.name}Request"
                # A watch of an ingestion repeats what the ingestion itself reports.
                assert responses in {f"{method.name}Response", *events} or method.name == "WatchIngestionJob"


def test_money_is_an_integer_of_nanousd(contract: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """No float and no other unit for money, anywhere."""
    integer = descriptor_pb2.FieldDescriptorProto.TYPE_INT64
    money = [(f.name, f.type) for file in contract for _, message in messages(file) for f in message.field if "nanousd" in f.name]
    other = [
        f.name
        for file in contract
        for _, message in messages(file)
        for f in message.field
        if re.search(r"(^|_)(usd|cost|price_amount|cents)$", f.name)
    ]

    assert [name for name, kind in money if kind != integer] == []
    assert other == []
