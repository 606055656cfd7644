"""A gateway that says what a test scripts: the HTTP surface that the page uses, with the real content policy and the committed build.

No service is behind it.
"""

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from services.gateway.page import POLICY, STATIC

TOKEN = "e30.eyJzdWIiOiJhZGEiLCJ0ZW5hbnQiOiJhY21lIn0.c2ln"
WHO = {"user": "ada", "tenant": "acme"}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@dataclass(frozen=True)
class Event:
    """One event of the answer's log; its position among the events of the script is its sequence."""

    name: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """The stream ends with this error."""

    reason: str
    title: str
    detail: str = ""


class Cut:
    """The connection breaks here, for the first reader only."""


Beat = Event | Problem | Cut | Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Script:
    """What is said of one question."""

    beats: Sequence[Beat]
    at_stop: Sequence[Event]


def step(name: str, status: str = "done", started: float = 0.0, took: float = 0.0, **facts: str) -> Event:
    return Event("step", {"name": name, "status": status, "started_ms": started, "duration_ms": took, "facts": facts})


def delta(text: str) -> Event:
    return Event("delta", {"text": text})


def citation(number: int) -> Event:
    return Event("citation", {"number": number, "start": "0", "end": "3", "document_id": f"doc-{number}", "chunk_id": f"chunk-{number}"})


def passages(*texts: str, title: str = "Streams", ending: str = "md") -> Event:
    return Event("passages", {"passages": [passage(number, text, f"{title} {number}", ending) for number, text in enumerate(texts, 1)]})


def passage(number: int, text: str, title: str, ending: str) -> dict[str, Any]:
    return {
        "number": number,
        "document_id": f"doc-{number}",
        "chunk_id": f"chunk-{number}",
        "title": title,
        "source_uri": f"docs/streams-{number}.{ending}",
        "text": text,
        "start": str(1200 * number),
        "end": str(1200 * number + len(text)),
        "score": 0.0325,
        "heading_path": ["Design", f"Part {number}"],
        "document_version": "3",
    }


def done(text: str, **changes: Any) -> Event:
    """A receipt for `text`."""
    receipt = {
        "answer_id": "",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "usage": {
            "input_tokens": "1532",
            "output_tokens": "214",
            "cache_read_tokens": "0",
            "cache_write_tokens": "0",
            "cache_write_1h_tokens": "0",
        },
        "cost_nanousd": "7806000",
        "model": "claude-sonnet-4-5",
        "tier": "smart",
        "finish_reason": "end_turn",
        "cache": {"verdict": "miss", "saved_nanousd": "0", "reason": "below_threshold"},
        "trace_id": TRACE,
        "estimated": False,
        "verdict": "passed",
        "first_token_ms": 412.4,
        "duration_ms": 2310.0,
        "provider": "anthropic",
    }
    return Event("done", receipt | changes)


@dataclass
class FakeGateway:
    """What was asked of the gateway, and what it says."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    resumed: list[tuple[str, int]] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Conversations with their turns, by id."""
    uploaded: dict[str, bytes] = field(default_factory=dict)
    refusal: tuple[int, dict[str, Any]] | None = None
    """What POST /v1/answers says instead of answering."""
    busy_uploads: int = 0
    """How many uploads are told to come back in a second."""
    unread_pages: dict[str, str] = field(default_factory=dict)
    """Of files, by their names."""
    url: str = ""
    _scripts: dict[str, Script] = field(default_factory=dict)
    _answers: dict[str, "_Running"] = field(default_factory=dict)

    def on(self, question: str, *beats: Beat, at_stop: Sequence[Event] = ()) -> None:
        """Says what is answered to `question`, and what a stopped answer still says before its end."""
        self._scripts[question] = Script(beats, at_stop)

    def app(self) -> Starlette:
        routes = [
            Route("/", lambda _: FileResponse(STATIC / "index.html")),
            Route("/v1/session", self._sign_in, methods=["POST"]),
            Route("/v1/session", self._who),
            Route("/v1/session", self._sign_out, methods=["DELETE"]),
            Route("/v1/answers", self._ask, methods=["POST"]),
            Route("/v1/answers/{id}/events", self._events),
            Route("/v1/answers/{id}/cancel", self._cancel, methods=["POST"]),
            Route("/v1/sessions", self._sessions),
            Route("/v1/sessions/{id}", self._session),
            Route("/v1/sessions/{id}", self._rename, methods=["PATCH"]),
            Route("/v1/sessions/{id}", self._forget, methods=["DELETE"]),
            Route("/v1/documents", self._upload, methods=["POST"]),
            Route("/v1/documents", self._list),
            Route("/v1/documents/{id}", self._delete, methods=["DELETE"]),
            Mount("/", StaticFiles(directory=STATIC)),
        ]
        return Starlette(routes=routes)

    async def _sign_in(self, request: Request) -> Response:
        if (await request.json())["token"] != TOKEN:
            return _problem(401, _problem_document(401, "NOT_AUTHENTICATED", "A valid token is needed", "The token is not valid"))
        response = _json(WHO, 201)
        response.set_cookie("tailrace", TOKEN, max_age=600, httponly=True, samesite="strict")
        return response

    async def _who(self, request: Request) -> Response:
        return _unauthenticated(request) or _json(WHO)

    async def _sign_out(self, request: Request) -> Response:
        response = Response(status_code=204)
        response.delete_cookie("tailrace", httponly=True, samesite="strict")
        return response

    async def _ask(self, request: Request) -> Response:
        if refused := _unauthenticated(request):
            return refused
        body = await request.json()
        self.asked.append(body)
        if self.refusal:
            return _problem(*self.refusal)
        answer_id = f"answer-{len(self.asked)}"
        answer = self._answers[answer_id] = _Running(answer_id, body["session_id"] or "session-1", self._scripts[body["question"]])
        return StreamingResponse(answer.read(0), media_type="text/event-stream")

    async def _events(self, request: Request) -> Response:
        answer_id, after = request.path_params["id"], int(request.headers["last-event-id"])
        self.resumed.append((answer_id, after))
        return _unauthenticated(request) or StreamingResponse(self._answers[answer_id].read(after), media_type="text/event-stream")

    async def _cancel(self, request: Request) -> Response:
        self.cancelled.append(request.path_params["id"])
        self._answers[request.path_params["id"]].cancelled.set()
        return Response(status_code=202)

    async def _list(self, request: Request) -> Response:
        return _unauthenticated(request) or _json({"documents": self.documents})

    async def _delete(self, request: Request) -> Response:
        self.documents = [one for one in self.documents if one["document_id"] != request.path_params["id"]]
        return _json({})

    async def _sessions(self, request: Request) -> Response:
        listed = [{**session, "turns": len(session["turns"])} for session in self.sessions.values()]
        return _unauthenticated(request) or _json({"sessions": listed, "next_page_token": ""})

    async def _session(self, request: Request) -> Response:
        return _unauthenticated(request) or _json(self.sessions[request.path_params["id"]])

    async def _rename(self, request: Request) -> Response:
        session = self.sessions[request.path_params["id"]]
        session["title"] = (await request.json())["title"]
        return _json(session)

    async def _forget(self, request: Request) -> Response:
        del self.sessions[request.path_params["id"]]
        return Response(status_code=204)

    async def _upload(self, request: Request) -> Response:
        if self.busy_uploads:
            self.busy_uploads -= 1
            problem = _problem_document(429, "RATE_LIMITED", "Too many requests", "")
            return Response(orjson.dumps(problem), 429, {"retry-after": "1"}, "application/problem+json")
        async with request.form() as form:
            files = [(one.filename or "", await one.read()) for one in form.getlist("files") if isinstance(one, UploadFile)]
        return StreamingResponse(self._index(files), media_type="text/event-stream")

    async def _index(self, files: list[tuple[str, bytes]]) -> AsyncIterator[bytes]:
        sequence = 0
        for index, (name, content) in enumerate(files):
            self.uploaded[name] = content
            stages = ["received", "failed"] if b"\0" in content else ["received", "parsed", "chunked", "embedded", "indexed"]
            for stage in stages:
                sequence += 1
                unread = self.unread_pages.get(name, "") if stage not in ("received", "failed") else ""
                yield _block("progress", sequence, {**_progress(index, name, stage, len(content)), "unread_pages": unread})
            if stages[-1] == "indexed":
                self.documents.insert(0, document(name, len(content), self.unread_pages.get(name, "")))
        yield _block("done", sequence + 1, {"job_id": "job-1", "status": "ended"})


class _Running:
    """One answer being read from its script."""

    def __init__(self, answer_id: str, session_id: str, script: Script) -> None:
        self.id = answer_id
        self.cancelled = asyncio.Event()
        self._session_id = session_id
        self._script = script
        self._cut: set[int] = set()

    async def read(self, after: int) -> AsyncIterator[bytes]:
        accepted = Event("accepted", {"answer_id": self.id, "session_id": self._session_id, "trace_id": TRACE})
        sequence = 0
        for index, beat in enumerate((accepted, *self._script.beats)):
            if isinstance(beat, Event):
                sequence += 1
                if sequence > after:
                    yield _block(beat.name, sequence, beat.data)
            elif isinstance(beat, Problem):
                yield _block("error", None, _problem_document(503, beat.reason, beat.title, beat.detail))
                return
            elif isinstance(beat, Cut):
                if index not in self._cut:
                    self._cut.add(index)
                    return
            elif await self._interrupted(beat):
                for last in self._script.at_stop:
                    sequence += 1
                    yield _block(last.name, sequence, last.data)
                yield _block("error", None, _problem_document(499, "ANSWER_CANCELLED", "The answer was cancelled", ""))
                return

    async def _interrupted(self, beat: Callable[[], Awaitable[object]]) -> bool:
        """Waits for the beat or for a cancel; says whether the cancel came first."""
        waits = [asyncio.ensure_future(beat()), asyncio.ensure_future(self.cancelled.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self.cancelled.is_set()


def document(name: str, size: int, unread_pages: str = "") -> dict[str, Any]:
    return {
        "document_id": f"id-of-{name}",
        "title": name,
        "source_uri": name,
        "collection": "default",
        "media_type": "text/markdown",
        "version": "1",
        "bytes": str(size),
        "characters": str(size),
        "chunks": 4,
        "indexed_at": "2026-01-15T09:30:00Z",
        "unread_pages": unread_pages,
    }


def _progress(index: int, name: str, stage: str, size: int) -> dict[str, Any]:
    failed = stage == "failed"
    return {
        "job_id": "job-1",
        "index": index,
        "name": name,
        "document_id": f"id-of-{name}",
        "stage": stage,
        "bytes": str(size),
        "chunks_total": 4 if stage in ("chunked", "embedded", "indexed") else 0,
        "chunks_done": 4 if stage in ("embedded", "indexed") else 0,
        "version": "1",
        "error_reason": "DOCUMENT_REJECTED" if failed else "",
        "error_detail": "The file is not text" if failed else "",
    }


def _block(name: str, sequence: int | None, data: dict[str, Any]) -> bytes:
    head = b"" if sequence is None else b"id: %d\n" % sequence
    return b": heartbeat\n\n" + head + b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps(data))


def _json(data: dict[str, Any], status: int = 200, media_type: str = "application/json") -> Response:
    return Response(orjson.dumps(data), status, media_type=media_type)


def _problem_document(status: int, reason: str, title: str, detail: str) -> dict[str, Any]:
    kind = f"/problems/{reason.lower().replace('_', '-')}"
    return {
        "type": kind,
        "title": title,
        "status": status,
        "detail": detail,
        "reason": reason,
        "retryable": status >= 429,
        "trace_id": TRACE,
    }


def _problem(status: int, document: dict[str, Any]) -> Response:
    return _json(document, status, "application/problem+json")


def _unauthenticated(request: Request) -> Response | None:
    own = request.method == "GET" or "x-tailrace-request" in request.headers
    if own and "authorization" not in request.headers and request.cookies.get("tailrace") == TOKEN:
        return None
    return _problem(401, _problem_document(401, "NOT_AUTHENTICATED", "A valid token is needed", "send `authorization: Bearer <token>`"))


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The test runner keeps its own signal handlers."""
        yield


@contextlib.asynccontextmanager
async def serving(gateway: FakeGateway) -> AsyncIterator[FakeGateway]:
    """Serves `gateway` on a free port of the loopback address."""
    app = gateway.app()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await app(scope, receive, with_policy)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _QuietServer(uvicorn.Config(guarded, lifespan="off", log_level="error", timeout_graceful_shutdown=1))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        gateway.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield gateway
        finally:
            server.should_exit = True
            await task
