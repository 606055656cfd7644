"""Every server describes itself to tools that know nothing of it, and answers every method it describes."""

import grpc
import pytest
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2 as pb
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from services.chassis.passport import Passport
from services.chassis.principal import Principal
from tests.suite import SERVICES, Suite


async def described(channel: grpc.aio.Channel, service: str) -> DescriptorPool:
    """All files that `service` needs, as a tool fetches them: by symbol, then import by import."""
    found: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    asked = [pb.ServerReflectionRequest(file_containing_symbol=service)]
    while asked:
        call = ServerReflectionStub(channel).ServerReflectionInfo(iter([asked.pop()]))
        async for reply in call:
            assert not reply.HasField("error_response"), reply.error_response.error_message
            for data in reply.file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                if file.name not in found:
                    found[file.name] = file
                    asked += [pb.ServerReflectionRequest(file_by_filename=name) for name in file.dependency if name not in found]
    pool = DescriptorPool()
    left = list(found.values())
    while left:
        file = left.pop(0)
        if any(name in {other.name for other in left} for name in file.dependency):
            left.append(file)
        else:
            pool.Add(file)
    return pool


@pytest.mark.parametrize("name", SERVICES)
async def test_a_tool_that_knows_nothing_can_call_every_method(suite: Suite, name: str) -> None:
    """Reflection lists the service, its files resolve, and no method it names is unimplemented."""
    service = f"tailrace.{name}.v1.{name.capitalize()}Service"
    passport = Passport(suite.environment["TAILRACE_INTERNAL_KEY"].encode())
    principal = Principal("acme", "tool", frozenset({"user", "admin", "service"}))
    identity = [("authorization", f"Bearer {suite.token('tool')}")] if name == "gateway" else passport.sign(principal)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{suite.ports[name]}") as channel:
        call = ServerReflectionStub(channel).ServerReflectionInfo(iter([pb.ServerReflectionRequest(list_services="")]))
        listed = [entry.name async for reply in call for entry in reply.list_services_response.service]
        pool = await described(channel, service)

        assert {service, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} == set(listed)
        for method in pool.FindServiceByName(service).methods:
            kind = "stream" if method.client_streaming else "unary"
            call_it = getattr(channel, f"{kind}_{'stream' if method.server_streaming else 'unary'}")(f"/{service}/{method.name}")
            empty = message_factory.GetMessageClass(method.input_type)().SerializeToString()
            code = grpc.StatusCode.OK
            try:
                calling = call_it(iter([empty]) if method.client_streaming else empty, metadata=tuple(identity), timeout=5)
                if method.server_streaming:
                    await calling.read()
                    calling.cancel()
                else:
                    await calling
            except grpc.aio.AioRpcError as error:
                code = error.code()
            assert code not in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), method.full_name
