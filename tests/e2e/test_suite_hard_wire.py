"""The whole suite with every inner wire as mutual TLS, and an answer over a WebSocket through all of it."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from services.local.processes import grpc_health
from tests.certificates import Authority
from tests.e2e.conftest import DOCUMENTS
from tests.suite import SERVICES, ingest, running


@pytest.mark.slow
async def test_an_answer_over_a_websocket_through_mutual_tls(tmp_path: Path) -> None:
    """Asked, streamed with every number once, and resumed from the middle with the same events; inner ports talk to nobody else."""
    files = Authority(tmp_path).issue("service")
    async with running(**files.environment) as suite:
        async with suite.client() as client:
            await ingest(client, DOCUMENTS)
        headers = {"authorization": f"Bearer {suite.token()}"}
        async with connect(f"ws://127.0.0.1:{suite.ports['http']}/v1/answers/ws", additional_headers=headers, proxy=None) as socket:

            async def texts() -> list[dict[str, Any]]:
                heard = [json.loads(await socket.recv())]
                while heard[-1]["type"] not in ("done", "error", "cancelled", "end"):
                    heard.append(json.loads(await socket.recv()))
                return [text for text in heard if text["type"] != "heartbeat"]

            await socket.send(json.dumps({"type": "ask", "question": "Who rebuilt the heron gate?", "request_id": "r"}))
            asked = await texts()
            await socket.send(json.dumps({"type": "resume", "answer_id": asked[0]["answer_id"], "after": 2, "request_id": "r"}))
            resumed = await texts()
        reader, writer = await asyncio.open_connection("127.0.0.1", suite.ports["http"])
        writer.write(b"this is not HTTP\r\n\r\n")
        refused = await reader.read()
        writer.close()
        plain = [await grpc_health(f"127.0.0.1:{suite.ports[name]}")() for name in SERVICES]

    assert asked[-1]["type"] == "done", asked[-1]
    assert [text["id"] for text in asked] == list(range(1, len(asked) + 1))
    assert resumed == asked[2:]
    assert re.search(rb"\r\nx-trace-id: [0-9a-f]{32}\r\n", refused), refused
    assert plain == [False] * len(SERVICES)
