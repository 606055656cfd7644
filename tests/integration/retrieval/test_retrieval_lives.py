"""The service as a process: killed, restarted, and without its server."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.errors import Unavailable
from services.chassis.principal import Principal
from services.local.stores import Valkey, free_port
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tests.integration.retrieval.retrieval_kit import KEY, Retrieval, running, settings_for

ROOT = Path(__file__).resolve().parents[3]
PAGE = {"guide.md": "# Timeouts\n\nThe default timeout is five seconds of network inactivity.\n"}


async def spawn(folder: Path, port: int, redis_url: str) -> asyncio.subprocess.Process:
    environment = {
        **os.environ,
        "TAILRACE_STATE_DIR": str(folder),
        "TAILRACE_INTERNAL_KEY": KEY,
        "TAILRACE_RETRIEVAL_PORT": str(port),
        "QDRANT_URL": "",
        "REDIS_URL": redis_url,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'sdk'}",
    }
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.retrieval", env=environment, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )


async def until_serving(retrieval: Retrieval) -> None:
    """Return when the service says it is ready."""
    stub = health_pb2_grpc.HealthStub(retrieval.channel)
    async for state in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60):
        if state.status == health_pb2.HealthCheckResponse.SERVING:
            return


@pytest.mark.slow
async def test_a_killed_service_comes_back_with_all_it_had_acknowledged(
    state_dir: Path, tmp_path: Path, valkey: Valkey, ann: Principal
) -> None:
    """kill -9 while a document is being taken in: what was acknowledged is there, the other one is not, and work goes on."""
    (tmp_path / "models").symlink_to(state_dir / "models")
    (state_dir / "models").mkdir(exist_ok=True)
    port = free_port()
    retrieval = Retrieval(f"127.0.0.1:{port}")
    process = await spawn(tmp_path, port, valkey.url)
    try:
        await until_serving(retrieval)
        await retrieval.ingest(ann, PAGE)
        epoch, _, _ = await retrieval.recall(ann, "anything")
        await retrieval.remember(ann, "What is the default timeout?", "Five.", epoch)
        large = "\n\n".join(f"# Part {number}\n\n{'many words about something ' * 40}" for number in range(200))
        doomed = asyncio.create_task(retrieval.ingest(ann, {"large.md": large}))
        await asyncio.wait([doomed], timeout=0.5)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        with pytest.raises(Unavailable):
            await doomed

        process = await spawn(tmp_path, port, valkey.url)
        await until_serving(retrieval)
        after, verdict, passages = await retrieval.recall(ann, "What is the default timeout?")
        assert (epoch, "Five.", ["guide.md"]) == (after, verdict.answer.text, [passage.source_uri for passage in passages])
        assert ["guide.md"] == list(await retrieval.ids(ann))
        assert "indexed" == (await retrieval.ingest(ann, {"later.md": "# Later\n\nIt works again.\n"}))[-1].stage
    finally:
        await retrieval.channel.close()
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.communicate(), 20)
    assert 0 == process.returncode


@pytest.mark.slow
async def test_a_second_process_on_the_same_folder_says_so_and_goes(retrieval: Retrieval, state_dir: Path, valkey: Valkey) -> None:
    """The exit code says that it failed, the log says why; the first process is not disturbed."""
    process = await spawn(state_dir, free_port(), valkey.url)
    _, log = await asyncio.wait_for(process.communicate(), 60)

    assert 1 == process.returncode
    assert b"in use by another retrieval process" in log
    assert await retrieval.ask("Embed", pb.EmbedRequest(texts=["still here"]), Principal("acme", "ann"))


async def test_without_its_server_it_starts_is_not_ready_and_says_why(retrieval: Retrieval, state_dir: Path, ann: Principal) -> None:
    """Every call that needs the store names it and when to come back; health says which dependency is away."""
    async with running(settings_for(state_dir, qdrant_url=f"http://127.0.0.1:{free_port()}", qdrant_grpc_port=free_port())) as alone:
        for call in (
            alone.search(ann, "anything"),
            alone.recall(ann, "anything"),
            alone.ids(ann),
            alone.remember(ann, "anything", "text", 0),
            alone.ask("GetDocument", pb.GetDocumentRequest(document_id="4b06d89c-9d11-517c-bd09-8a247df74fbf"), ann),
        ):
            with pytest.raises(Unavailable) as away:
                await call
            assert ("qdrant", "1000") == (away.value.metadata["dependency"], away.value.metadata["retry_after_ms"])
        progress = await alone.ingest(ann, PAGE)
        assert ("failed", "UNAVAILABLE") == (progress[-1].stage, progress[-1].error_reason)
        assert (await alone.ask("Embed", pb.EmbedRequest(texts=["needs no store"]), ann)).embeddings
        health = health_pb2_grpc.HealthStub(alone.channel)
        state = await health.Check(health_pb2.HealthCheckRequest(service="dependency.qdrant"))
        assert health_pb2.HealthCheckResponse.NOT_SERVING == state.status
