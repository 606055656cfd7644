"""Files made to cost memory, time or secrets: each ends in an error that names its cause, within bounds, while others are read."""

import asyncio
import contextlib
import io
import json
import os
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.chassis.errors import DocumentRejected
from services.retrieval.domain import Upload
from services.retrieval.parsing import Limits, ParserPool
from tests.fakes import confined

RSS_MIB_MAX = 512
SECONDS_MAX = 30
WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
ENTITY = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>'


def archive(*members: tuple[str, bytes | str]) -> bytes:
    """A ZIP file of `members`."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as files:
        for name, content in members:
            files.writestr(name, content)
    return packed.getvalue()


def word(body: str) -> bytes:
    return archive(("word/document.xml", f"<w:document {WORD}><w:body>{body}</w:body></w:document>"))


def laughs() -> str:
    """Ten to the ninth times the same word."""
    entities = "".join(f'<!ENTITY l{level} "{f"&l{level - 1};" * 10}">' for level in range(1, 10))
    return f'<!DOCTYPE a [<!ENTITY l0 "lol">{entities}]><a>&l9;</a>'


def pdf_bomb() -> bytes:
    """Three kilobytes that become half a gigabyte."""
    data = zlib.compress(zlib.compress(b"BT /F 12 Tf (aaaaaaaaaaaaaaaaaaaa) Tj ET\n" * 12_000_000, 9), 9)
    return (
        b"%%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 500 500]/Contents 4 0 R>>endobj\n"
        b"4 0 obj<</Filter[/FlateDecode/FlateDecode]/Length %d>>stream\n" % len(data)
    ) + (data + b"\nendstream endobj\ntrailer<</Root 1 0 R>>\nstartxref\n0\n%%EOF")


def pdf_loop() -> bytes:
    """Pages that are their own parents, and a drawing that draws itself twice."""
    return (
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[2 0 R 3 0 R]/Count 2/Parent 2 0 R>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/Contents 4 0 R/Resources<</XObject<</X 5 0 R>>>>>>endobj\n"
        b"4 0 obj<</Length 6>>stream\n/X Do \nendstream endobj\n"
        b"5 0 obj<</Type/XObject/Subtype/Form/BBox[0 0 9 9]/Resources<</XObject<</X 5 0 R>>>>"
        b"/Length 12>>stream\n/X Do /X Do \nendstream endobj\n"
        b"trailer<</Root 1 0 R>>\nstartxref\n0\n%%EOF"
    )


HOSTILE: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "a thousand to one.docx": (lambda: archive(("word/document.xml", b"a" * 200_000_000)), {"zip_bomb"}),
    "entries.docx": (lambda: archive(*((str(number), "") for number in range(100_000)), ("word/document.xml", "x")), {"zip_bomb"}),
    "nested.zip": (lambda: archive(("a.zip", archive(("b.zip", archive(("c", "x")))))), {"archive"}),
    "laughs.xml": (lambda: laughs().encode(), {"dtd"}),
    "laughs.docx": (lambda: archive(("word/document.xml", laughs())), {"dtd"}),
    "entity.xml": (lambda: ENTITY.encode(), {"dtd"}),
    "entity.docx": (lambda: archive(("word/document.xml", ENTITY)), {"dtd"}),
    "remote.xml": (lambda: b'<!DOCTYPE a SYSTEM "http://127.0.0.1:1/x.dtd"><a>x</a>', {"dtd"}),
    "deep.json": (lambda: b"[" * 100_000 + b"]" * 100_000, {"malformed", "too_deep"}),
    "deep.xml": (lambda: b"<a>" * 100_000 + b"</a>" * 100_000, {"malformed", "too_deep"}),
    "attributes.xml": (lambda: b"<a " + b" ".join(b'a%d="1"' % n for n in range(500_000)) + b"/>", {"timeout", "too_large", "malformed"}),
    "loop.pdf": (pdf_loop, {"malformed", "no_text", "crashed", "truncated"}),
    "bomb.pdf": (pdf_bomb, {"too_large", "crashed", "timeout", "no_text"}),
    "cut.docx": (lambda: word("<w:p/>")[:-30], {"truncated", "malformed"}),
    "zeros.txt": (lambda: bytes(5_000_000), {"binary"}),
}


def peak_mib(pids: set[int]) -> int:
    """The most that any of these processes has had resident."""
    peak = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
            peak = max(peak, int(line.split()[1]) // 1024)
    return peak


async def until(true: Callable[[], object], seconds: float) -> None:
    """Wait for what no event tells."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - processes come and go without a word
            await asyncio.sleep(0.01)


def children() -> set[int]:
    """Processes that this one started."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def is_confined(pid: int) -> bool:
    """Whether a reader has given up what it does not need. That is the last it does before its first file."""
    limit = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max address space"))
    return "unlimited" not in limit.split()[3]


def cpu_ticks(pid: int) -> int:
    """What a process has used of the CPU."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


@pytest.fixture
async def pool() -> AsyncIterator[ParserPool]:
    async with ParserPool(Limits(workers=2, timeout_s=8)).running() as running:
        yield running


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_file_is_refused_by_its_cause_within_bounds(pool: ParserPool, name: str) -> None:
    """Memory of its reader, time, and the answer; a good file beside it is read as if nothing were."""
    make, causes = HOSTILE[name]
    content = await asyncio.to_thread(make)
    before, peaks = children(), [0]

    async def watch() -> None:
        while True:
            peaks.append(peak_mib(children() - before))
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    began = time.monotonic()
    try:
        reading = asyncio.create_task(pool.parse(Upload(content, source_uri=name)))
        good = await pool.parse(Upload(b"# Harbour\n\nThe light is red.\n", source_uri="good.md"))
        with pytest.raises(DocumentRejected) as refused:
            await reading
    finally:
        watching.cancel()

    assert "The light is red." in good.text
    assert refused.value.metadata["cause"] in causes
    assert "passwd" not in refused.value.detail
    assert time.monotonic() - began < SECONDS_MAX
    assert 0 < max(peaks) < RSS_MIB_MAX


async def test_a_reader_that_is_killed_costs_its_own_file_only(pool: ParserPool) -> None:
    """SIGKILL in the middle: that file is told so, and the next one is read by another process."""
    before = children()  # the stores that other tests share among them
    slow = asyncio.create_task(
        pool.parse(Upload(b"<a " + b" ".join(b'a%d="1"' % n for n in range(300_000)) + b"/>", source_uri="slow.xml"))
    )
    await until(lambda: any(map(is_confined, children() - before)), 30)
    (reader,) = children() - before
    started = cpu_ticks(reader)
    await until(lambda: cpu_ticks(reader) >= started + 5, 30)  # what it does once it is confined is to read
    os.kill(reader, signal.SIGKILL)
    with pytest.raises(DocumentRejected) as refused:
        await slow

    assert refused.value.metadata["cause"] in {"crashed", "timeout", "too_large", "malformed"}
    assert (await pool.parse(Upload(b"Still here.", source_uri="next.txt"))).text.strip() == "Still here."


async def test_who_stops_waiting_ends_the_reading_and_the_pool_leaves_no_process() -> None:
    """Cancellation reaches the process, and so does the end of the pool."""
    before = children()
    async with ParserPool(Limits(workers=1, timeout_s=20)).running() as pool:
        slow = asyncio.create_task(
            pool.parse(Upload(b"<a " + b" ".join(b'a%d="1"' % n for n in range(500_000)) + b"/>", source_uri="slow.xml"))
        )
        await until(lambda: children() - before, 10)
        await asyncio.sleep(0.3)  # any moment will do
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        async with asyncio.timeout(5):
            assert (await pool.parse(Upload(b"At once.", source_uri="next.txt"))).text.strip() == "At once."
    await until(lambda: not children() - before, 5)


async def test_a_parser_reaches_neither_network_nor_files_nor_other_programs(tmp_path: Path) -> None:
    """Code that runs where files are read tries each door, through Python and past it, and finds all of them closed.

    Past Python, files are out of its reach where the kernel has Landlock.
    """
    (tmp_path / "secret").write_text("a token")
    program = Path(confined.__file__)
    environ = {"PYTHONPATH": str(program.parents[2]), "PATH": os.environ["PATH"]}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fakes.confined", str(os.getpid()), str(tmp_path), env=environ, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    outcomes = json.loads(said)

    assert process.returncode == 0
    assert outcomes == dict.fromkeys(confined.refused_here(), "refused") | dict.fromkeys(confined.ALLOWED, "done")
    assert {"secret": "a token"} == {path.name: path.read_text() for path in tmp_path.iterdir()}


async def test_what_a_document_names_is_not_opened(pool: ParserPool) -> None:
    """Neither files nor addresses: an include directive shows as text or not at all."""
    text = "Title\n=====\n\n.. include:: /etc/passwd\n\n.. image:: http://127.0.0.1:1/x.png\n\nThe end.\n"
    extracted = await pool.parse(Upload(text.encode(), source_uri="include.rst"))

    assert "The end." in extracted.text
    assert "root:" not in extracted.text


async def test_nothing_of_the_service_runs_in_a_parser_before_it_is_one() -> None:
    """What libraries do in a forked child hung one process in a hundred of a busy service; here it would end it."""
    script = (
        "import os, uvloop\n"
        "from services.retrieval.domain import Upload\n"
        "from services.retrieval.parsing import Limits, ParserPool\n"
        "async def main():\n"
        "    async with ParserPool(Limits(workers=1)).running() as pool:\n"
        "        print((await pool.parse(Upload(b'It is read.', source_uri='a.txt'))).text)\n"
        "os.register_at_fork(after_in_child=lambda: os._exit(7))\n"
        "uvloop.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()

    assert (said.decode().strip(), process.returncode) == ("It is read.", 0)
