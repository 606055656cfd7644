"""Documents over HTTP: uploads that are passed on as they come, and nothing half-written when they break."""

import asyncio
import json

import httpx
import pytest
from google.protobuf.json_format import MessageToDict

from services.gateway.bodies import DOCUMENT_BYTES_MAX
from tailrace.common.v1 import common_pb2 as common
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval
from tests.integration.gateway.conftest import Front, problem_of, until
from tests.integration.gateway.test_gateway_answers import blocks_of

MULTIPART = {"content-type": "multipart/form-data; boundary=frontier"}


def form(*parts: bytes) -> bytes:
    """A multipart body of the given parts."""
    return b"".join(b"--frontier\r\n" + part + b"\r\n" for part in parts) + b"--frontier--\r\n"


def file_part(name: bytes, content: bytes, field: bytes = b"files", media_type: bytes = b"text/plain") -> bytes:
    return b'Content-Disposition: form-data; name="%s"; filename="%s"\r\nContent-Type: %s\r\n\r\n%s' % (field, name, media_type, content)


async def test_files_arrive_whole_and_in_order_with_progress_of_each(front: Front, client: httpx.AsyncClient) -> None:
    """Every byte of every file reaches retrieval; the stream tells each stage and ends with one `done`."""
    large = bytes(range(256)) * 4096
    files = [("files", ("a.md", b"# A\r\n--frontier", "text/markdown")), ("files", ("b.bin", large, "application/octet-stream"))]

    response = await client.post("/v1/documents", files=files)
    events = blocks_of(response.text)
    headers = [header for header, _ in front.behind.retrieval.documents]

    assert response.headers["content-type"] == "text/event-stream"
    assert [content for _, content in front.behind.retrieval.documents] == [b"# A\r\n--frontier", large]
    assert [(header.source_uri, header.media_type, header.detach) for header in headers] == [
        ("a.md", "text/markdown", False),
        ("b.bin", "", False),
    ]
    assert {event["data"]["name"] for event in events[:-1]} == {"a.md", "b.bin"}
    assert events[-1]["event"] == "done"
    assert events[-1]["data"] == {"job_id": "job-1", "documents": 2, "indexed": 2, "unchanged": 0, "rejected": 0}


async def test_a_collection_in_the_form_is_that_of_the_files_after_it(front: Front, client: httpx.AsyncClient) -> None:
    """Files before it go to the default one."""
    body = form(b'Content-Disposition: form-data; name="collection"\r\n\r\nhandbook', file_part("ä.txt".encode(), b"text"))

    await client.post("/v1/documents", content=body, headers=MULTIPART)
    header, _ = front.behind.retrieval.documents[0]

    assert (header.collection, header.source_uri) == ("handbook", "ä.txt")


async def test_facts_in_the_form_are_those_of_the_files_after_it(front: Front, client: httpx.AsyncClient) -> None:
    """Metadata and readers; a file before them has none, and no word about access is not the same as nobody."""
    facts = b'Content-Disposition: form-data; name="facts"\r\n\r\n{"metadata": {"team": "core"}, "access": {"groups": ["crew"]}}'

    await client.post("/v1/documents", content=form(file_part(b"a.txt", b"a"), facts, file_part(b"b.txt", b"b")), headers=MULTIPART)
    (before, _), (after, _) = front.behind.retrieval.documents

    assert not before.metadata
    assert not before.HasField("access")
    assert (after.metadata["team"].string_value, list(after.access.groups)) == ("core", ["crew"])


@pytest.mark.parametrize(
    "facts", [b"{", b'{"access": {"users": [""]}}', b'{"metadata": {"k": [1]}}', b'{"secret": 1}', b'{"metadata": {"k": null}}']
)
async def test_facts_that_make_no_sense_are_refused(front: Front, client: httpx.AsyncClient, facts: bytes) -> None:
    """By the name of the field in them."""
    body = form(b'Content-Disposition: form-data; name="facts"\r\n\r\n' + facts, file_part(b"a.txt", b"a"))
    response = await client.post("/v1/documents", content=body, headers=MULTIPART)

    assert problem_of(response, 400, "REQUEST_INVALID")["field"].startswith("facts")
    assert front.behind.retrieval.documents == []


async def test_a_document_as_json_arrives_as_its_text(front: Front, client: httpx.AsyncClient) -> None:
    """Title, address, metadata and collection go along."""
    metadata = {"k": "v", "year": 2026, "draft": False}
    access = {"users": ["bob"], "groups": ["crew"]}
    body = {"title": "T", "text": "ünï\0x", "source_uri": "u", "metadata": metadata, "collection": "c", "access": access}

    response = await client.post("/v1/documents", json=body)
    header, content = front.behind.retrieval.documents[0]

    assert response.status_code == 200
    assert (header.title, header.source_uri, header.collection) == ("T", "u", "c")
    assert {name: MessageToDict(value) for name, value in header.metadata.items()} == metadata
    assert (list(header.access.users), list(header.access.groups)) == (["bob"], ["crew"])
    assert content == "ünï\0x".encode()


async def test_lines_of_json_are_documents_of_one_job(front: Front, client: httpx.AsyncClient) -> None:
    """Blank lines are nothing; the last line needs no end."""
    lines = [json.dumps({"title": f"T{number}", "text": "x" * number}) for number in range(1, 4)]

    response = await client.post("/v1/documents:bulk", content="\n\n".join(lines), headers={"content-type": "application/x-ndjson"})

    assert [content for _, content in front.behind.retrieval.documents] == [b"x", b"xx", b"xxx"]
    assert blocks_of(response.text)[-1]["data"]["documents"] == 3


async def test_without_waiting_the_job_is_named_when_every_byte_arrived(front: Front, client: httpx.AsyncClient) -> None:
    """202 with a place to look; retrieval was told to go on alone."""
    response = await client.post("/v1/documents?wait=false", files=[("files", ("a.md", b"# A", "text/markdown"))])
    header, content = front.behind.retrieval.documents[0]

    assert (response.status_code, response.headers["location"]) == (202, "/v1/jobs/job-1")
    assert response.json()["job_id"] == "job-1"
    assert (header.detach, content) == (True, b"# A")


BROKEN_FORMS = [
    (b"", "body"),
    (b"nonsense", "body"),
    (form(file_part(b"a.txt", b"text"))[:-6], "body"),
    (form(file_part(b"a.txt", b"text", field=b"other")), "other"),
    (form(file_part(b"", b"text")), "files.filename"),
    (form(file_part(b"a\0b", b"text")), "files.filename"),
    (form(file_part(b"\xff\xfe", b"text")), "files.filename"),
    (form(b'Content-Disposition: form-data; name="collection"\r\n\r\n../..', file_part(b"a", b"b")), "collection"),
    (form(b'Content-Disposition: form-data; name="collection"\r\n\r\nc'), "files"),
    (form(b"X-A: 1\r\n" * 30 + file_part(b"a", b"b")), "body"),
]


@pytest.mark.parametrize(("body", "field"), BROKEN_FORMS)
async def test_a_broken_form_is_a_problem_and_leaves_nothing(front: Front, client: httpx.AsyncClient, body: bytes, field: str) -> None:
    """400 that names the field; retrieval never sees a whole document."""
    response = await client.post("/v1/documents", content=body, headers=MULTIPART)

    assert problem_of(response, 400, "REQUEST_INVALID")["field"] == field
    assert front.behind.retrieval.documents == []


async def test_a_file_above_the_bound_ends_the_upload(front: Front, client: httpx.AsyncClient) -> None:
    """413 with the bound in bytes, and no half document."""
    body = form(file_part(b"large.txt", b"x" * (DOCUMENT_BYTES_MAX + 1)))

    problem = problem_of(await client.post("/v1/documents", content=body, headers=MULTIPART), 413, "PAYLOAD_TOO_LARGE")

    assert problem["bound_bytes"] == str(DOCUMENT_BYTES_MAX)
    assert front.behind.retrieval.documents == []


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(front: Front) -> None:
    """The call behind is cancelled, not closed, so half a file is not taken for a whole one."""
    _, writer = await asyncio.open_connection("127.0.0.1", front.http_port)
    head = f"POST /v1/documents HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.token()}\r\ncontent-length: 100000\r\n"
    writer.write(
        head.encode() + b"content-type: multipart/form-data; boundary=frontier\r\n\r\n" + form(file_part(b"a.txt", b"text" * 999))[:-20]
    )
    await writer.drain()

    async def begun() -> bool:
        return front.behind.seen.count("IngestDocuments") > 0

    async def broken_off() -> bool:
        return front.behind.retrieval.broken_off > 0

    await until(begun)
    writer.close()
    await until(broken_off)

    assert front.behind.retrieval.documents == []


async def test_a_body_that_stops_coming_is_a_timeout(front: Front) -> None:
    """408 instead of a connection held for ever."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.http_port)
    head = f"POST /v1/search HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.token()}\r\ncontent-length: 10\r\n\r\n{{"
    writer.write(head.encode())
    status = await asyncio.wait_for(reader.readline(), 5)
    writer.close()

    assert status == b"HTTP/1.1 408 Request Timeout\r\n"


@pytest.mark.parametrize("line", [b'{"title": "T"}', b'{"title": "T", "text": "x", "more": 1}', b"{", b'{"title": "T", "text": ""}'])
async def test_a_bad_line_is_named_by_its_number(front: Front, client: httpx.AsyncClient, line: bytes) -> None:
    """And the lines before it are not half of anything."""
    body = b'{"title": "A", "text": "a"}\n' + line

    problem = problem_of(
        await client.post("/v1/documents:bulk", content=body, headers={"content-type": "application/x-ndjson"}), 400, "REQUEST_INVALID"
    )

    assert problem["field"].startswith("line 2")


async def test_other_media_types_are_refused(front: Front, client: httpx.AsyncClient) -> None:
    """415 that names what is read here."""
    for path in ("/v1/documents", "/v1/documents:bulk", "/v1/answers", "/v1/search"):
        response = await client.post(path, content=b"<x/>", headers={"content-type": "application/xml"})

        assert "application/" in problem_of(response, 415, "MEDIA_TYPE_UNSUPPORTED")["accepts"]


async def test_documents_are_listed_shown_and_deleted(front: Front, client: httpx.AsyncClient) -> None:
    """Pages by token; a document with its chunks; an unknown one is a 404."""
    listed = (await client.get("/v1/documents", params={"page_size": 1, "collection": "c"})).json()
    shown = (await client.get("/v1/documents/d-1", params={"first_chunk": 3})).json()
    deleted = await client.delete("/v1/documents/d-1")

    assert (listed["documents"][0]["document_id"], listed["next_page_token"]) == ("d-1", "next")
    assert shown["chunks"][0]["end"] == 4
    assert front.behind.seen.last("GetDocument")[0].first_chunk == 3
    assert deleted.json() == {"document_id": "d-1", "chunks_deleted": 3}
    problem_of(await client.get("/v1/documents/other"), 404, "NOT_FOUND")


async def test_collections_are_listed(front: Front, client: httpx.AsyncClient) -> None:
    """As the service behind knows them; unknown parameters are refused."""
    listed = (await client.get("/v1/collections")).json()

    collection = {"collection": "c", "documents": "2", "epoch": str(2**60), "embedder_id": "one", "next_embedder_id": "", "reembedded": "1"}
    assert listed == {"collections": [collection]}
    problem_of(await client.get("/v1/collections", params={"tenant": "other"}), 400, "REQUEST_INVALID")


async def test_search_gives_hits_with_numbers_for_offsets(front: Front, client: httpx.AsyncClient) -> None:
    """Mode, limit and collection are passed on."""
    passage = common.CitedPassage(number=1, document_id="d", chunk_id="c", text="t", start=5, end=6, score=0.5)
    front.behind.retrieval.hits = [retrieval.SearchResponse(hit=passage)]

    hits = (await client.post("/v1/search", json={"query": "q", "limit": 3, "mode": "sparse", "collection": "x"})).json()["hits"]
    request, _ = front.behind.seen.last("Search")

    assert (hits[0]["document_id"], hits[0]["start"], hits[0]["end"], hits[0]["score"]) == ("d", 5, 6, 0.5)
    assert (request.limit, request.mode, request.collection) == (3, retrieval.SEARCH_MODE_SPARSE, "x")


async def test_a_search_passes_on_every_condition_and_shows_what_explains_a_hit(front: Front, client: httpx.AsyncClient) -> None:
    """Typed values stay what they are; dates are their first instant; a hit has its page, flags, explanation and neighbours."""
    passage = common.CitedPassage(number=1, document_id="d", page=3, flags=["override"])
    around = [retrieval.Chunk(chunk_id=name, ordinal=place, end=9) for place, name in ((0, "b"), (2, "a"))]
    explanation = retrieval.HitExplanation(dense_rank=2, fused_score=0.5, language="en")
    front.behind.retrieval.hits = [retrieval.SearchResponse(hit=passage, explanation=explanation, before=around[:1], after=around[1:])]
    body = {
        "query": "q",
        "more_collections": ["x", "y"],
        "document_ids": ["d"],
        "metadata": [
            {"key": "a.b", "any_of": ["1", 1, True], "negated": True},
            {"key": "n", "at_least": 0, "below": 2.5},
            {"key": "t", "from": "2026-01-01", "until": "2026-01-01T01:00:00+01:00"},
        ],
        "neighbours": 1,
        "explain": True,
    }

    (hit,) = (await client.post("/v1/search", json=body)).json()["hits"]
    request, _ = front.behind.seen.last("Search")
    first, second, third = request.metadata

    assert (["x", "y"], ["d"], 1, True) == (list(request.more_collections), list(request.document_ids), request.neighbours, request.explain)
    assert ["string_value", "number_value", "bool_value"] == [value.WhichOneof("kind") for value in first.any_of]
    assert (True, False, "a.b") == (first.negated, first.HasField("at_least"), first.key)
    assert (0.0, 2.5) == (second.at_least, second.below)
    assert second.HasField("at_least")
    assert third.HasField("until")
    assert getattr(third, "from") == third.until
    assert (3, ["override"], 2, "en") == (hit["page"], hit["flags"], hit["explanation"]["dense_rank"], hit["explanation"]["language"])
    assert "sparse_rank" not in hit["explanation"]
    assert (["b"], ["a"], 9) == (
        [row["chunk_id"] for row in hit["before"]],
        [row["chunk_id"] for row in hit["after"]],
        hit["after"][0]["end"],
    )


async def test_a_job_is_shown_as_json_or_followed_as_a_stream(front: Front, client: httpx.AsyncClient) -> None:
    """By Accept."""
    shown = (await client.get("/v1/jobs/job-1")).json()
    followed = blocks_of((await client.get("/v1/jobs/job-1", headers={"accept": "text/event-stream"})).text)

    await client.get("/v1/jobs/job-1?first_document=7000")
    refused = await client.get("/v1/jobs/job-1?first_document=-1")

    assert (shown["job_id"], shown["status"], shown["next_document"]) == ("job-1", "running", 0)
    assert [0, 7000] == [request.first_document for name, request, _ in front.behind.seen.calls if name == "GetIngestionJob"]
    assert problem_of(refused, 400, "REQUEST_INVALID")["field"] == "first_document"
    assert [event["event"] for event in followed] == ["progress", "done"]


async def test_jobs_are_listed_cancelled_and_retried(front: Front, client: httpx.AsyncClient) -> None:
    """A page with its token; a body may name one document and may be left out; a number that cannot be is refused here."""
    listed = (await client.get("/v1/jobs?page_size=2")).json()
    whole = (await client.post("/v1/jobs/job-1/cancel")).json()
    one = (await client.post("/v1/jobs/job-1/retry", json={"index": 0})).json()
    refused = await client.post("/v1/jobs/job-1/retry", json={"index": -1})

    assert (["job-2", "job-1"], "more") == ([job["job_id"] for job in listed["jobs"]], listed["next_page_token"])
    assert ({"job_id": "job-1", "cancelled": 2}, {"job_id": "job-1", "retried": 1}) == (whole, one)
    asked = {name: request for name, request, _ in front.behind.seen.calls}
    assert not asked["CancelIngestionJob"].HasField("index")
    assert asked["RetryIngestionJob"].HasField("index")
    assert problem_of(refused, 400, "REQUEST_INVALID")["field"] == "index"
