"""Documents come in, are found, change and go, through a real channel."""

import asyncio
import itertools
from pathlib import Path

import grpc
import pytest
from google.protobuf import struct_pb2
from google.protobuf.json_format import MessageToDict

from services.chassis.channel import open_channel
from services.chassis.errors import NotFound, RequestInvalid
from services.chassis.principal import Principal
from services.retrieval.domain import Extracted, Upload
from services.retrieval.ingest import DOCUMENT_BYTES_MAX
from services.retrieval.parsers.outline import Outline
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tailrace.retrieval.v1 import retrieval_service_pb2_grpc as pb_grpc
from tests.fakes.documents import half_scanned_pdf
from tests.integration.retrieval.retrieval_kit import Retrieval, running, settings_for, stages, upload

GUIDE = """# Timeouts

The default timeout is five seconds of network inactivity.

## Pools

A pool keeps at most one hundred connections.
"""


async def test_a_half_scanned_document_says_which_pages_are_missing(retrieval: Retrieval, ann: Principal) -> None:
    """While it is taken in, when it comes again, and ever after."""
    files: dict[str, bytes | str] = {"half.pdf": half_scanned_pdf("tpptp"), "whole.pdf": half_scanned_pdf("tt")}
    first, again = await retrieval.ingest(ann, files), await retrieval.ingest(ann, files)
    rows = await retrieval.stream("ListDocuments", pb.ListDocumentsRequest(), ann)

    for told, stage in ((first, "indexed"), (again, "unchanged")):
        assert {"half.pdf": "2-3, 5", "whole.pdf": ""} == {row.name: row.unread_pages for row in told if row.stage == stage}
    assert {"half.pdf": "2-3, 5", "whole.pdf": ""} == {row.document.source_uri: row.document.unread_pages for row in rows}


class ReadsOff:
    """An OCR that finds the same sentence on every page it is given."""

    async def read(self, upload: Upload) -> Extracted:
        outline = Outline()
        outline.page()
        outline.paragraph("The heron waits in shallow water.")
        return outline.extracted("application/pdf")


@pytest.mark.slow
async def test_a_document_gets_its_pictures_when_it_comes_again_and_an_ocr_is_there(
    state_dir: Path, tmp_path: Path, ann: Principal
) -> None:
    """The same bytes are a new version then, once; what was a picture is found, on its own page."""
    (tmp_path / "models").symlink_to(state_dir / "models")
    files: dict[str, bytes | str] = {"half.pdf": half_scanned_pdf("tpt")}
    async with running(settings_for(tmp_path)) as retrieval:
        without = await retrieval.ingest(ann, files)
    async with running(settings_for(tmp_path, ocr=f"{__name__}:ReadsOff")) as retrieval:
        first, again = await retrieval.ingest(ann, files), await retrieval.ingest(ann, files)
        hits = await retrieval.search(ann, "Where does the heron wait?")
        shown = await retrieval.stream("ListDocuments", pb.ListDocumentsRequest(), ann)

    ends = [(told[-1].stage, told[-1].version, told[-1].unread_pages) for told in (without, first, again)]
    assert [("indexed", 1, "2"), ("indexed", 2, ""), ("unchanged", 2, "")] == ends
    assert "The heron waits in shallow water." in hits[0].text
    assert (3, "") == (shown[0].document.pages, shown[0].document.unread_pages)


async def test_a_document_goes_through_all_stages_and_is_found_with_exact_offsets(retrieval: Retrieval, ann: Principal) -> None:
    """The passage that comes back is a stretch of the text that went in, with its headings."""
    progress = await retrieval.ingest(
        ann, {"guide.md": GUIDE}, metadata={"team": struct_pb2.Value(string_value="core"), "year": struct_pb2.Value(number_value=2026)}
    )

    assert ["received", "parsed", "chunked", "embedded", "indexed"] == stages(progress)
    assert (1, 1, 1) == (progress[-1].version, progress[-1].chunks_total, progress[-1].chunks_done)
    (hit,) = await retrieval.search(ann, "How long is the timeout?")
    assert (1, "Timeouts", "guide.md", 1) == (hit.number, hit.title, hit.source_uri, hit.document_version)
    assert hit.text == GUIDE[hit.start : hit.end]
    shown = await retrieval.ask("GetDocument", pb.GetDocumentRequest(document_id=hit.document_id), ann)
    assert [hit.text] == [chunk.text for chunk in shown.chunks]
    assert {"team": "core", "year": 2026.0} == {name: MessageToDict(value) for name, value in shown.document.metadata.items()}
    assert (len(GUIDE.encode()), len(GUIDE)) == (shown.document.bytes, shown.document.characters)
    assert "text/markdown" == shown.document.media_type


async def test_the_same_again_is_unchanged_and_moves_no_epoch(retrieval: Retrieval, ann: Principal) -> None:
    """Nothing is embedded or written twice, and cached answers stay reachable."""
    await retrieval.ingest(ann, {"guide.md": GUIDE})
    epoch, _, _ = await retrieval.recall(ann, "anything")
    progress = await retrieval.ingest(ann, {"guide.md": GUIDE})

    assert ["received", "parsed", "unchanged"] == stages(progress)
    assert epoch == (await retrieval.recall(ann, "anything"))[0]


async def test_the_same_again_is_cut_anew_where_the_rules_of_cutting_changed(
    retrieval: Retrieval, ann: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that cuts otherwise leaves what is stored as it is until it comes again, and then does its work once."""
    with monkeypatch.context() as older:
        older.setattr("services.retrieval.ingest.CUT", "of an older release")
        await retrieval.ingest(ann, {"guide.md": GUIDE})

    assert "indexed" == stages(await retrieval.ingest(ann, {"guide.md": GUIDE}))[-1]
    assert "unchanged" == stages(await retrieval.ingest(ann, {"guide.md": GUIDE}))[-1]


async def test_no_passage_says_what_another_says(retrieval: Retrieval, ann: Principal) -> None:
    """A text that is cut leads up to each of its chunks, and is shown once: hits never share a character, nor a sentence."""
    text = " ".join(f"Station {place} of the otter trail has a bench, a map and a view." for place in range(80))
    await retrieval.ingest(ann, {"trail.txt": text})
    hits = sorted(await retrieval.search(ann, "Which station of the otter trail has a bench?", limit=10), key=lambda hit: hit.start)

    assert len(hits) >= 3
    assert all(hit.text == text[hit.start : hit.end] for hit in hits)
    assert all(before.end <= after.start for before, after in itertools.pairwise(hits))


async def test_changed_content_replaces_the_old_chunks(retrieval: Retrieval, ann: Principal) -> None:
    """The same source with other content is version 2, and nothing of version 1 is found any more."""
    await retrieval.ingest(ann, {"guide.md": GUIDE})
    before, _, _ = await retrieval.recall(ann, "anything")
    progress = await retrieval.ingest(ann, {"guide.md": "# Timeouts\n\nThere is no timeout at all.\n"})

    assert (["received", "parsed", "chunked", "embedded", "indexed"], 2) == (stages(progress), progress[-1].version)
    after, _, passages = await retrieval.recall(ann, "What is the default timeout?")
    assert after > before
    assert ["# Timeouts\n\nThere is no timeout at all."] == [passage.text for passage in passages]


async def test_a_search_during_a_change_sees_one_version_and_never_both(retrieval: Retrieval, ann: Principal) -> None:
    """While a document is replaced again and again, every search finds exactly one whole version of it."""
    versions = [f"# Alpha\n\nzebra number {number}\n\n# Beta\n\n{'filler words ' * 120}\n\nzebra number {number}\n" for number in range(6)]
    await retrieval.ingest(ann, {"zebra.md": versions[0]})

    async def replace() -> None:
        for version in versions[1:]:
            await retrieval.ingest(ann, {"zebra.md": version})

    replacing = asyncio.create_task(replace())
    seen = set()
    while not replacing.done():
        hits = await retrieval.search(ann, "zebra number", mode=pb.SEARCH_MODE_SPARSE)
        found = {hit.document_version for hit in hits}
        assert 1 == len(found), found
        seen |= found
    await replacing

    assert len(seen) > 1


async def test_deleting_removes_the_document_and_bumps_the_epoch(retrieval: Retrieval, ann: Principal) -> None:
    """After the reply nothing of it is found, listed or shown; a second deletion finds nothing."""
    await retrieval.ingest(ann, {"guide.md": GUIDE, "other.md": "# Other\n\nSomething else entirely.\n"})
    before, _, _ = await retrieval.recall(ann, "anything")
    gone = (await retrieval.ids(ann))["guide.md"]
    reply = await retrieval.ask("DeleteDocument", pb.DeleteDocumentRequest(document_id=gone), ann)

    assert 1 == reply.chunks_deleted
    assert ["other.md"] == [hit.source_uri for hit in await retrieval.search(ann, "default timeout")]
    assert ["other.md"] == list(await retrieval.ids(ann))
    assert before < (await retrieval.recall(ann, "anything"))[0]
    requests = (("GetDocument", pb.GetDocumentRequest(document_id=gone)), ("DeleteDocument", pb.DeleteDocumentRequest(document_id=gone)))
    for method, request in requests:
        with pytest.raises(NotFound):
            await retrieval.ask(method, request, ann)


async def test_a_bad_document_fails_with_its_reason_and_stops_no_other(retrieval: Retrieval, ann: Principal) -> None:
    """Binary, empty, foreign and oversized files are told apart; the good one between them is indexed."""
    big = b"word " * (DOCUMENT_BYTES_MAX // 5 + 1)
    files: dict[str, bytes | str] = {
        "a.txt": b"\x00\x01\x02\x03",
        "b.md": " \n ",
        "c.pdf": b"%PDF-1.7",
        "big.txt": big,
        "ok.md": GUIDE,
        "empty.txt": "",
    }
    progress = await retrieval.ingest(ann, files)

    ends = {event.name: (event.stage, event.error_reason) for event in progress if event.stage in ("indexed", "failed")}
    assert {
        "a.txt": ("failed", "DOCUMENT_REJECTED"),
        "b.md": ("failed", "DOCUMENT_REJECTED"),
        "c.pdf": ("failed", "DOCUMENT_REJECTED"),
        "big.txt": ("failed", "PAYLOAD_TOO_LARGE"),
        "ok.md": ("indexed", ""),
        "empty.txt": ("failed", "DOCUMENT_REJECTED"),
    } == ends
    assert ["ok.md"] == list(await retrieval.ids(ann))


async def test_nothing_of_another_tenant_can_be_seen_or_touched(retrieval: Retrieval, ann: Principal, eve: Principal) -> None:
    """Foreign and unknown look the same in every call, for an admin, too."""
    progress = await retrieval.ingest(ann, {"guide.md": GUIDE})
    document, job = progress[-1].document_id, progress[-1].job_id

    assert [] == await retrieval.search(eve, "default timeout")
    assert [] == await retrieval.search(eve, "default timeout", document_ids=[document])
    assert (0, []) == ((found := await retrieval.recall(eve, "default timeout"))[0], found[2])
    assert {} == await retrieval.ids(eve)
    for method, request in (
        ("GetDocument", pb.GetDocumentRequest(document_id=document)),
        ("DeleteDocument", pb.DeleteDocumentRequest(document_id=document)),
        ("GetIngestionJob", pb.GetIngestionJobRequest(job_id=job)),
    ):
        with pytest.raises(NotFound) as foreign:
            await retrieval.ask(method, request, eve)
        unknown = type(request)(**{field.name: "4b06d89c-9d11-517c-bd09-8a247df74fbf" for field in request.DESCRIPTOR.fields[:1]})
        with pytest.raises(NotFound) as missing:
            await retrieval.ask(method, unknown, eve)
        assert (str(foreign.value), foreign.value.metadata) == (str(missing.value), missing.value.metadata)
    with pytest.raises(NotFound):
        await retrieval.stream("WatchIngestionJob", pb.WatchIngestionJobRequest(job_id=job), eve)
    assert ["guide.md"] == list(await retrieval.ids(ann))


async def test_the_same_name_in_two_tenants_is_two_documents(retrieval: Retrieval, ann: Principal, eve: Principal) -> None:
    """One tenant's change leaves the other's document alone."""
    await retrieval.ingest(ann, {"guide.md": GUIDE})
    await retrieval.ingest(eve, {"guide.md": "# Hers\n\nNothing about that.\n"})

    assert (await retrieval.ids(ann)) != (await retrieval.ids(eve))
    assert ["Timeouts"] == [hit.title for hit in await retrieval.search(ann, "default timeout")]


async def test_collections_are_kept_apart(retrieval: Retrieval, ann: Principal) -> None:
    """A search sees its own collection alone."""
    await retrieval.ingest(ann, {"guide.md": GUIDE}, collection="one")

    assert [] == await retrieval.search(ann, "default timeout", collection="two")
    assert [] == await retrieval.search(ann, "default timeout")
    assert 1 == len(await retrieval.search(ann, "default timeout", collection="one"))
    assert ["guide.md"] == list(await retrieval.ids(ann, collection="one"))
    assert {} == await retrieval.ids(ann, collection="two")


async def test_documents_are_listed_newest_first_in_pages(retrieval: Retrieval, ann: Principal) -> None:
    """Every document is on exactly one page; the last page has no token."""
    names = [f"{number}.md" for number in range(5)]
    for name in names:  # one after the other: those of one job are worked on side by side
        await retrieval.ingest(ann, {name: f"# {name}\n\ntext of {name}\n"})
    listed, token = [], ""
    while True:
        rows = await retrieval.stream("ListDocuments", pb.ListDocumentsRequest(page_size=2, page_token=token), ann)
        listed += [row.document.source_uri for row in rows]
        assert not any(row.next_page_token for row in rows[:-1])
        if not (token := rows[-1].next_page_token):
            break

    assert names[::-1] == listed


async def test_a_long_document_is_shown_in_pages(retrieval: Retrieval, ann: Principal) -> None:
    """Chunks come in reading order, as many as asked for, with the place to go on."""
    await retrieval.ingest(ann, {"long.md": "\n\n".join(f"# Part {number}\n\n{'words of it ' * 50}" for number in range(5))})
    id_ = (await retrieval.ids(ann))["long.md"]
    ordinals, first = [], 0
    while True:
        shown = await retrieval.ask("GetDocument", pb.GetDocumentRequest(document_id=id_, first_chunk=first, chunks_max=2), ann)
        ordinals += [chunk.ordinal for chunk in shown.chunks]
        if not (first := shown.next_chunk):
            break

    assert list(range(shown.document.chunks)) == ordinals


async def test_a_job_can_be_read_and_watched_after_it_ended(retrieval: Retrieval, ann: Principal) -> None:
    """Watching late gives the whole progress; reading gives the latest of each document."""
    progress = await retrieval.ingest(ann, {"guide.md": GUIDE, "bad.txt": ""})
    job = await retrieval.ask("GetIngestionJob", pb.GetIngestionJobRequest(job_id=progress[0].job_id), ann)

    assert ("ended", ["indexed", "failed"]) == (job.status, [document.stage for document in job.documents])
    watched = await retrieval.stream("WatchIngestionJob", pb.WatchIngestionJobRequest(job_id=progress[0].job_id), ann)
    # Who sends the documents hears that the last one is whole before the first one may be done; nothing else differs.
    assert sorted(progress, key=lambda row: row.index) == sorted(watched, key=lambda row: row.index)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("cut", ["cancel", "connection"])
async def test_half_a_document_is_never_taken_for_a_whole_one(retrieval: Retrieval, ann: Principal, cut: str, detach: bool) -> None:
    """gRPC ends the requests of a caller that died as if it had finished; nothing of what it was sending may be indexed."""
    async with open_channel(retrieval.caller.target) as channel:
        stub = pb_grpc.RetrievalServiceStub(channel)
        call = stub.IngestDocuments(metadata=retrieval.caller.metadata(ann))
        await call.write(pb.IngestDocumentsRequest(header=pb.DocumentHeader(source_uri="whole.txt", detach=detach)))
        await call.write(pb.IngestDocumentsRequest(content=b"The whole text."))
        await call.write(pb.IngestDocumentsRequest(header=pb.DocumentHeader(source_uri="half.txt")))
        first = await call.read()
        await call.write(pb.IngestDocumentsRequest(content=b"Half of a text that goes on"))
        await asyncio.sleep(0.1)  # so that the cut does not overtake the content, which would be the easier case
        if cut == "cancel":
            call.cancel()
        else:
            await channel.close(None)

    told = await retrieval.stream("WatchIngestionJob", pb.WatchIngestionJobRequest(job_id=first.job_id), ann)
    assert "half.txt" not in {progress.name for progress in told}
    assert "half.txt" not in await retrieval.ids(ann)


@pytest.mark.parametrize("detach", [False, True])
async def test_a_caller_who_leaves_stops_the_ingestion_unless_it_is_detached(retrieval: Retrieval, ann: Principal, detach: bool) -> None:
    """What was whole before stays whole; of the rest nothing is there. Detached, everything that was received gets indexed."""
    files: dict[str, bytes | str] = {"first.md": GUIDE} | {f"{number}.md": f"# {number}\n\n{'some words ' * 2000}" for number in range(3)}
    handed_over = asyncio.Event()

    async def sending():  # type: ignore[no-untyped-def]
        async for message in upload(files, detach=detach):
            yield message
        handed_over.set()
        await asyncio.Event().wait()

    async with retrieval.caller.stream(retrieval.stub.IngestDocuments, sending(), timeout_s=60, principal=ann) as messages:
        async for message in messages:
            job_id = message.job_id
            # The last document's content lies with the client until the server asks for it, so wait for both.
            if message.stage == "indexed" and (handed_over.is_set() or not detach):
                break
    ended = await retrieval.stream("WatchIngestionJob", pb.WatchIngestionJobRequest(job_id=job_id), ann)
    listed = await retrieval.ids(ann)

    indexed = {event.name for event in ended if event.stage == "indexed"}
    assert indexed == set(listed)
    assert "first.md" in listed
    assert detach == ("1.md" in listed)
    for id_ in listed.values():
        shown = await retrieval.ask("GetDocument", pb.GetDocumentRequest(document_id=id_), ann)
        assert shown.document.chunks == len(shown.chunks)


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Search", pb.SearchRequest(query=""), "query"),
        ("Search", pb.SearchRequest(query="x" * 32_769), "query"),
        ("Search", pb.SearchRequest(query="x", limit=101), "limit"),
        ("Search", pb.SearchRequest(query="x", limit=-1), "limit"),
        ("Search", pb.SearchRequest(query="x", mode=77), "mode"),
        ("Search", pb.SearchRequest(query="x", collection="no spaces"), "collection"),
        ("Search", pb.SearchRequest(query="x", document_ids=["a"] * 101), "document_ids"),
        ("Recall", pb.RecallRequest(question=" \n ", cache_scope="s"), "question"),
        ("Recall", pb.RecallRequest(question="x", want_cached=True), "cache_scope"),
        ("Recall", pb.RecallRequest(question="x", passages_max=33), "passages_max"),
        ("ListDocuments", pb.ListDocumentsRequest(page_size=1001), "page_size"),
        ("ListDocuments", pb.ListDocumentsRequest(page_token="not ours"), "page_token"),
    ],
)
async def test_bad_input_names_its_field(retrieval: Retrieval, ann: Principal, method: str, request_: object, field: str) -> None:
    """Every bound is checked before anything is done."""
    with pytest.raises(RequestInvalid) as refused:
        await retrieval.stream(method, request_, ann)

    assert field == refused.value.field


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "header"),
        ([pb.IngestDocumentsRequest(content=b"x")], "header"),
        ([pb.IngestDocumentsRequest()], "part"),
        ([pb.IngestDocumentsRequest(header=pb.DocumentHeader(collection="../x"))], "collection"),
        ([pb.IngestDocumentsRequest(header=pb.DocumentHeader(title="x" * 513))], "header.title"),
        (
            [
                pb.IngestDocumentsRequest(
                    header=pb.DocumentHeader(metadata={str(key): struct_pb2.Value(bool_value=True) for key in range(33)})
                )
            ],
            "header.metadata",
        ),
        (
            [pb.IngestDocumentsRequest(header=pb.DocumentHeader(metadata={"list": struct_pb2.Value(list_value=struct_pb2.ListValue())}))],
            "header.metadata.list",
        ),
    ],
)
async def test_a_stream_that_makes_no_sense_is_refused(retrieval: Retrieval, ann: Principal, messages: list[object], field: str) -> None:
    """The stream ends in a typed error, and nothing is stored."""

    async def sending():  # type: ignore[no-untyped-def]
        for message in messages:
            yield message

    with pytest.raises(RequestInvalid) as refused:
        await retrieval.stream("IngestDocuments", sending(), ann)

    assert field == refused.value.field
    assert {} == await retrieval.ids(ann)


async def test_texts_become_vectors_of_unit_length_in_order(retrieval: Retrieval, ann: Principal) -> None:
    """The order is kept although batches are sorted by length."""
    texts = ["a cat", "a much longer sentence about the weather in the north of the country", "a dog"]
    together = await retrieval.ask("Embed", pb.EmbedRequest(texts=texts), ann)
    alone = [(await retrieval.ask("Embed", pb.EmbedRequest(texts=[text]), ann)).embeddings[0] for text in texts]

    for one, other in zip(together.embeddings, alone, strict=True):
        assert list(one.values) == pytest.approx(list(other.values), abs=1e-5)
        assert 1.0 == pytest.approx(sum(value * value for value in one.values), abs=1e-5)
    assert together.tokens > 15


UNREADABLE = {"empty.txt", "fake-text-all-whitespace.txt", "empty.xlsx", "password.pdf", "loremipsum-flat.pdf", "simple.zip"}


@pytest.mark.slow
async def test_real_documents_are_taken_in_or_refused_for_a_reason(retrieval: Retrieval, ann: Principal, data_dir: Path) -> None:
    """Every file gets in but those that nobody could read, each of which says why; a question finds its page."""
    files = {path.name: path.read_bytes() for path in sorted((data_dir / "docs").iterdir()) if path.name != "manifest.jsonl"}
    ends = {event.name: event for event in await retrieval.ingest(ann, dict(files)) if event.stage in ("indexed", "unchanged", "failed")}

    assert set(files) == set(ends)
    for name, event in ends.items():
        readable = name not in UNREADABLE
        assert ("indexed" if readable else "failed") == event.stage, (name, event.error_detail)
        assert readable or event.error_reason == "DOCUMENT_REJECTED"
    for question, name in (
        ("How do I use digest authentication?", "authentication.md"),
        ("Which middleware compresses responses with gzip?", "middleware.md"),
        ("What carbon content does the steel SNB22-3 have?", "example-steelJIS-datasheet-utf-16.html"),
        ("How does dense passage retrieval find candidate contexts?", "multi-column-2p.pdf"),
        ("Which trustee supervises cases under chapter 13?", "handbook-1p.docx"),
        ("How to add a bullet slide?", "fake-power-point.pptx"),
        ("How many cups did the Maple Leafs win?", "stanley-cups.xlsx"),
        ("Which leader has Trinidad & Tobado?", "factbook.xml"),
    ):
        assert name in [hit.source_uri for hit in await retrieval.search(ann, question, limit=3)], question


async def test_a_call_without_a_principal_or_without_a_tenant_is_refused(retrieval: Retrieval) -> None:
    """There is no anonymous memory, and nobody speaks for our own records."""
    for metadata in ((), retrieval.caller.metadata(Principal("", "root"))):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await retrieval.stub.ForgetAnswers(pb.ForgetAnswersRequest(), metadata=metadata)

        assert grpc.StatusCode.UNAUTHENTICATED is refused.value.code()
