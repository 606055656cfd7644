"""The wire between services: mutual TLS or nothing, a bounded message whatever it was compressed to, and no open doors."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psutil
import pytest

from services.chassis import server as chassis_server
from services.chassis.channel import Caller, open_channel
from services.chassis.config import ServiceSettings, SettingsError
from services.chassis.passport import PRINCIPAL_KEY, SIGNATURE_KEY, Passport
from services.chassis.principal import Principal
from services.chassis.server import HANDSHAKE_TIMEOUT_MS, MESSAGE_BYTES_MAX, METADATA_BYTES_MAX, Server, passport_identity
from services.chassis.tls import MutualTls
from services.local.processes import grpc_health
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tailrace.retrieval.v1 import retrieval_service_pb2_grpc as rpc
from tests.certificates import Authority, Files
from tests.integration.chassis.test_chassis_server import ALICE, NAME, PASSPORT, Scripted

EMBED = f"/{NAME}/Embed"


def tls_of(files: Files) -> MutualTls:
    return MutualTls.read(files.certificate, files.key, files.authority)


@contextlib.asynccontextmanager
async def listening(tls: MutualTls | None = None, *, verify_clients: bool = True) -> AsyncIterator[str]:
    """A server on a free port; its address."""
    server = Server(passport_identity(PASSPORT), reflect=False, tls=tls, verify_clients=verify_clients)
    server.add(rpc.add_RetrievalServiceServicer_to_server, Scripted(), NAME)
    port = await server.start("127.0.0.1", 0)
    await server.ready({})
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0, 0)


async def embed(channel: grpc.aio.Channel) -> int:
    """One call as a service makes it; the number of texts that arrived."""
    stub = rpc.RetrievalServiceStub(channel)
    reply = await Caller("retrieval", PASSPORT).unary(stub.Embed, pb.EmbedRequest(texts=["x"]), principal=ALICE, idempotent=False)
    return int(reply.tokens)


async def refusal(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """The status a call with a valid passport ends with; fails if it succeeds."""
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.RetrievalServiceStub(channel).Embed(pb.EmbedRequest(texts=["x"]), metadata=PASSPORT.sign(ALICE), timeout=5)
    code: grpc.StatusCode = caught.value.code()
    return code


async def test_a_certificate_of_the_authority_and_a_passport_get_through(tmp_path: Path) -> None:
    """Both are needed: the certificate alone makes nobody. Health is served to whoever has the certificate."""
    authority = Authority(tmp_path)
    client = tls_of(authority.issue("client"))
    async with listening(tls_of(authority.issue("server"))) as address, open_channel(address, client) as channel:
        assert await embed(channel) == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.RetrievalServiceStub(channel).Embed(pb.EmbedRequest(texts=["x"]))
        assert await grpc_health(address, client)()

    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_who_has_no_good_certificate_does_not_get_as_far_as_the_passport(tmp_path: Path) -> None:
    """No certificate, one of another authority, an expired one, no TLS at all; the passport is valid each time."""
    ours, theirs = Authority(tmp_path), Authority(tmp_path, "foreign")
    root = ours.file.read_bytes()
    async with listening(tls_of(ours.issue("server"))) as address:
        channels = {
            "none": grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root)),
            "foreign": open_channel(address, tls_of(theirs.issue("foreign-client", believes=ours))),
            "expired": open_channel(address, tls_of(ours.issue("expired-client", expired=True))),
            "plaintext": open_channel(address),
        }
        codes = {name: await refusal(channel) for name, channel in channels.items()}
        assert not await grpc_health(address)()

    assert codes == dict.fromkeys(channels, grpc.StatusCode.UNAVAILABLE)


async def test_a_channel_speaks_to_no_server_that_cannot_prove_itself(tmp_path: Path) -> None:
    """The principal is not shown to an impostor: not to a foreign certificate, an expired one, or plaintext."""
    ours, theirs = Authority(tmp_path), Authority(tmp_path, "foreign")
    client = tls_of(ours.issue("client"))
    servers = [tls_of(theirs.issue("foreign-server", believes=ours)), tls_of(ours.issue("expired-server", expired=True)), None]
    for server in servers:
        async with listening(server) as address:
            assert await refusal(open_channel(address, client)) is grpc.StatusCode.UNAVAILABLE


async def test_a_server_for_outside_callers_needs_no_certificate_of_theirs(tmp_path: Path) -> None:
    """It is TLS all the same."""
    authority = Authority(tmp_path)
    async with listening(tls_of(authority.issue("server")), verify_clients=False) as address:
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authority.file.read_bytes())) as channel:
            assert await embed(channel) == 1
        assert await refusal(open_channel(address)) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(("secure", "said"), [(True, b""), (True, b"\x16\x03\x01\x02\x00\x01\x00"), (False, b""), (False, b"PRI * HTT")])
async def test_a_connection_that_does_not_come_to_a_call_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool, said: bytes
) -> None:
    """Nothing at all, half a ClientHello, half of HTTP/2's preface: while others are served, it is ended within the bound."""
    bound = ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS)
    assert bound in chassis_server.SERVER_OPTIONS
    short = [(name, 1000) if (name, value) == bound else (name, value) for name, value in chassis_server.SERVER_OPTIONS]
    monkeypatch.setattr(chassis_server, "SERVER_OPTIONS", short)
    authority = Authority(tmp_path)
    tls = tls_of(authority.issue("retrieval")) if secure else None
    async with listening(tls) as target, open_channel(target, tls) as channel:
        reader, writer = await asyncio.open_connection(*target.split(":"))
        writer.write(said)
        assert await embed(channel) == 1
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
        writer.close()


@pytest.mark.parametrize("left_out", ["TAILRACE_TLS_CERT_FILE", "TAILRACE_TLS_KEY_FILE", "TAILRACE_TLS_CA_FILE"])
def test_half_a_configuration_says_what_is_missing(tmp_path: Path, left_out: str) -> None:
    """Never plaintext by mistake."""
    environ = {"TAILRACE_INTERNAL_KEY": "k" * 16, **Authority(tmp_path).issue("server").environment}
    assert ServiceSettings.load(environ).mutual_tls() is not None
    del environ[left_out]

    with pytest.raises(SettingsError, match=f"missing: {left_out}$"):
        ServiceSettings.load(environ)


def test_files_that_do_not_serve_are_named(tmp_path: Path) -> None:
    """A file that is not there, a key of another certificate, an authority that is none; and the key is in no repr."""
    authority = Authority(tmp_path)
    files, other = authority.issue("server"), authority.issue("other")
    good = {"TAILRACE_INTERNAL_KEY": "k" * 16, **files.environment}
    mistakes = {
        "TAILRACE_TLS_CERT_FILE": str(tmp_path / "nothing"),
        "TAILRACE_TLS_KEY_FILE": str(other.key),
        "TAILRACE_TLS_CA_FILE": str(files.key),
    }
    for name, path in mistakes.items():
        with pytest.raises(SettingsError, match=path):
            ServiceSettings.load({**good, name: path})

    assert "PRIVATE" not in repr(tls_of(files))


FORGED = Principal("globex", "eve", frozenset({"admin"}))
STOLEN, FAKE = Passport(b"another-key-of-length").sign(FORGED), PASSPORT.sign(ALICE)


@pytest.mark.parametrize(
    "metadata",
    [
        STOLEN,
        (*FAKE, *FAKE),
        (*FAKE, *STOLEN),
        (STOLEN[0], FAKE[1]),
        (FAKE[0], STOLEN[1]),
        (FAKE[0],),
        (("x-tailrace-principal", "acme/alice"), ("x-tailrace-signature", "x")),
        (("x-tenant", "acme"), ("x-user", "alice"), ("x-roles", "admin")),
        ((PRINCIPAL_KEY, b""), (SIGNATURE_KEY, b"")),
    ],
    ids=["other key", "twice", "two", "their principal", "their signature", "half", "not binary", "plain names", "empty"],
)
async def test_forged_metadata_makes_nobody(metadata: tuple[tuple[str, str | bytes], ...]) -> None:
    """One principal, one signature, both ours, or UNAUTHENTICATED."""
    async with listening() as address, open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.RetrievalServiceStub(channel).Embed(pb.EmbedRequest(texts=["x"]), metadata=metadata)

    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_name_in_mixed_case_cannot_be_sent() -> None:
    """HTTP/2 knows lower case only, so there is no second spelling of a key to hide behind."""
    async with listening() as address, open_channel(address) as channel:
        pairs = tuple((name.title(), value) for name, value in PASSPORT.sign(ALICE))
        with pytest.raises(Exception, match="execute_batch"):
            await rpc.RetrievalServiceStub(channel).Embed(pb.EmbedRequest(texts=["x"]), metadata=pairs)


async def code_of(address: str, message: bytes, **call: object) -> grpc.StatusCode:
    """The status of a call with a raw message."""
    unbounded = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 24), ("grpc.absolute_max_metadata_size", 1 << 24)]
    async with grpc.aio.insecure_channel(address, options=unbounded) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(EMBED)(message, **{"metadata": PASSPORT.sign(ALICE), "timeout": 60, **call})
    code: grpc.StatusCode = caught.value.code()
    return code


async def test_a_message_above_the_bound_is_refused_before_it_is_read() -> None:
    """And the connection serves on."""
    async with listening() as address, open_channel(address) as channel:
        assert await code_of(address, b"\0" * (MESSAGE_BYTES_MAX + 1)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await embed(channel) == 1


async def test_metadata_above_the_bound_is_refused() -> None:
    """Nobody fills the memory with names."""
    async with listening() as address, open_channel(address) as channel:
        metadata = (*PASSPORT.sign(ALICE), ("x-padding", "x" * METADATA_BYTES_MAX))
        assert await code_of(address, b"", metadata=metadata) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await embed(channel) == 1


async def test_channelz_and_reflection_are_not_there() -> None:
    """Unless it is asked for, a server tells nobody what it is."""
    async with listening() as address, open_channel(address) as channel:
        for method in ("/grpc.channelz.v1.Channelz/GetServers", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(method)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_that_is_none_is_bad_input() -> None:
    """INVALID_ARGUMENT, not a failure of ours, and no word about how it was read."""
    async with listening() as address:
        assert await code_of(address, b"\xff\xff\xff") is grpc.StatusCode.INVALID_ARGUMENT


BOMB_BYTES = 256 * 1024 * 1024
BOMB = f"""
import asyncio, sys, grpc

async def main():
    unbounded = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(sys.argv[1], options=unbounded) as channel:
        try:
            await channel.unary_unary({EMBED!r})(bytes({BOMB_BYTES}), compression=grpc.Compression.Gzip)
        except grpc.aio.AioRpcError as error:
            print(error.code().name)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_gzip_bomb_is_refused_while_it_inflates() -> None:
    """A quarter of a gigabyte of zeros, a thousandth of that on the wire: refused, without ever being in our memory."""
    async with listening() as address, open_channel(address) as channel:
        assert await embed(channel) == 1
        process = psutil.Process()
        before = peak = process.memory_info().rss
        bomber = await asyncio.create_subprocess_exec(sys.executable, "-c", BOMB, address, stdout=asyncio.subprocess.PIPE)
        assert bomber.stdout is not None
        reading = asyncio.create_task(bomber.stdout.read())
        while not reading.done():
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.001)
        await bomber.wait()
        assert await embed(channel) == 1

    assert reading.result().decode().strip() == "RESOURCE_EXHAUSTED"
    assert peak - before < 64 * 1024 * 1024
