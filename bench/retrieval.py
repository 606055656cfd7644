"""`make bench-retrieval DATA=…`: what retrieval finds, how quickly, at what cost and how safely, against the real service, beside its bars.

DATA is a folder with `retrieval/scifact`, `retrieval/chunk_spans`, `retrieval/xquad` and `docs`. Every scenario has a service process of
its own on an empty folder with default settings. Nothing of DATA is kept.
"""

import argparse
import asyncio
import contextlib
import gzip
import itertools
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil

from bench import ingestion_faults
from bench.ground import Bar, Outcome, seed_of_run, side_by_side
from bench.hostile_files import bombs
from bench.retrieval_figures import Span, backwards, common, length, mean, ndcg, percentile, recall
from bench.retrieval_ground import DENSE, DIMENSION, HYBRID, MODELS, QUANT, ROOT, SPARSE, File, Service, filling, scratch, serving
from bench.scenarios_command import rows
from services.retrieval import parsers
from services.retrieval.chunking import chunked, in_context
from services.retrieval.domain import Chunk, Stage, Upload
from services.retrieval.late_interaction import sketched
from services.retrieval.minilm_embedder import TOKENS_MAX, MiniLmEmbedder
from services.retrieval.word_pieces import WordPieces
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tests.suite import running

PLAIN = "text/plain"
MIB = 1024 * 1024
STAGES = [stage.value for stage in Stage]

GAIN, RECALL_MIN = 0.045, 0.95
SPEED_SHARE, GROWTH = 0.85, 1.15
ALONE_CHUNKS = 1000
"""Embedded alone before, and again after the ingestion, so that a machine that grows slower meanwhile is no gain."""
FIXED_TOKENS, FIXED_OVERLAP = 256, 0.2
TOP = 5
PARAGRAPH_TOP = 3
P50_MS, P99_MS = 15.0, 80.0
SEARCHES = 1000
CHUNKS_PER_DOCUMENT = 50
BESIDE_TIMES = 2.0
PAUSE_S = 0.05
"""Between two searches beside an ingestion, which gives way to them and would hardly come to its end without."""
WORKER_MIB, FILE_S = 512.0, 30.0
LOOK_S = 0.01
WORD = re.compile(r"[^\W_]{2}")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
"""A file without two letters or digits in a row has no sentence to be found by; it has to be taken in, and is named."""

MUST_FAIL = {"needs a password", "image only, needs OCR", "zero bytes", "only whitespace", "empty workbook", "archive"}
"""Notes of the manifest on files that hold no text for anybody."""
MAY_FAIL = {"malformed structure", "malformed", "malformed encoding", "truncated JSON"}
"""Notes on damaged files: read as far as they can be, or refused, but nothing else."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a scenario is given."""

    data: Path
    n: int
    seed: str

    def random(self, scenario: str) -> random.Random:
        return random.Random(f"{self.seed}:{scenario}")


@dataclass(slots=True)
class Watch:
    """What an ingestion said and weighed on its way."""

    service: Service
    documents: int
    stages: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    done: dict[int, int] = field(default_factory=dict)
    ended: int = 0
    backwards: int = 0
    memory: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Resident bytes and bytes stored, by per cent of the documents that had ended."""

    def hear(self, said: pb.IngestDocumentsResponse) -> None:
        self.stages[said.index].append(said.stage)
        self.backwards += said.chunks_done < self.done.get(said.index, 0) or (said.chunks_done > said.chunks_total)
        self.done[said.index] = said.chunks_done
        if Stage(said.stage).final:
            self.ended += 1
            for share in (25, 50, 100):
                if self.ended * 100 >= share * self.documents and share not in self.memory:
                    self.memory[share] = (self.service.rss(), self.service.stored())


async def scifact(run: Run) -> list[Outcome]:
    """Abstracts taken in and searched: what is found, and what taking in costs."""
    folder = run.data / "retrieval" / "scifact"
    corpus = list(_lines(folder / "corpus.jsonl.gz"))
    judged: dict[str, dict[str, int]] = defaultdict(dict)
    for line in (folder / "qrels.tsv").read_text().splitlines()[1:]:
        query, document, gain = line.split("\t")
        judged[query][document] = int(gain)
    if run.n < len(corpus):
        # What is asked for stays in, so that a short run is an easier one, but not a meaningless one.
        wanted = {document for relevant in judged.values() for document in relevant}
        corpus = sorted(corpus, key=lambda row: row["_id"] not in wanted)[: run.n]
    there = {row["_id"] for row in corpus}
    queries = [row for row in _lines(folder / "queries.jsonl") if row["_id"] in judged and judged[row["_id"]].keys() <= there]
    files = [File(row["_id"], row["text"].encode(), row["title"], PLAIN) for row in corpus]
    texts = await asyncio.to_thread(_chunk_texts, corpus)
    sample = run.random("scifact").sample(texts, min(ALONE_CHUNKS, len(texts)))
    async with scratch() as state, serving(state) as service:
        before = await _alone(sample)
        watch = Watch(service, len(files))
        began = time.monotonic()
        last = await service.ingest(files, "scifact", watch.hear)
        took_s = time.monotonic() - began
        after = await _alone(sample)
        taken_in = await _taken_in(service, watch, last, len(texts), took_s, (before, after), run.seed)
        found = await _found(service, queries, judged, len(files), run.seed)
    return [found, taken_in]


def _chunk_texts(corpus: list[dict[str, str]]) -> list[str]:
    """What the service embeds of these abstracts."""
    folder = next(MODELS.glob(f"minilm-l6-v2-{QUANT}-*"), None)
    if folder is None:
        MiniLmEmbedder.load(MODELS, QUANT).close()
        folder = next(MODELS.glob(f"minilm-l6-v2-{QUANT}-*"))
    count = WordPieces(folder / "tokenizer.json").count
    texts: list[str] = []
    for row in corpus:
        extracted = parsers.read(Upload(row["text"].encode(), title=row["title"], media_type=PLAIN))  # by content: one is a list
        texts += [in_context(row["title"], chunk) for chunk in chunked(extracted, count, row["title"])]
    return texts


async def _alone(texts: list[str]) -> float:
    """Chunks a second of the embedder in a process of its own."""
    command = (sys.executable, "-m", "bench.embedder_alone")
    pipe = asyncio.subprocess.PIPE
    paths = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'sdk'}"}
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT, env=paths)
    said, _ = await process.communicate(orjson.dumps(texts))
    assert process.returncode == 0, "the embedder alone did not come to its end"
    return float(said)


async def _taken_in(
    service: Service,
    watch: Watch,
    last: dict[int, pb.IngestDocumentsResponse],
    expected: int,
    took_s: float,
    alone: tuple[float, float],
    seed: str,
) -> Outcome:
    chunks = sum(said.chunks_total for said in last.values())
    stored = sum(document.chunks for document in await service.documents("scifact"))
    summary = await service.summary(last[0].job_id)
    lies = watch.backwards + sum(backwards(stages, STAGES) for stages in watch.stages.values())
    lies += abs(chunks - stored) + abs(summary.chunks_done - stored) + abs(summary.documents - watch.documents)
    lies += abs(expected - stored) + sum(said.stage != "indexed" for said in last.values())
    (rss, held), (rss_end, held_end) = watch.memory[25], watch.memory[100]
    rate, alone_rate = chunks / took_s, mean(alone)
    bars = [
        Bar("speed, as a share of the embedder alone", round(rate / alone_rate, 3), SPEED_SHARE, at_least=True),
        Bar("memory at the end, less what the store grew", round((rss_end - held_end + held) / MIB), round(rss * GROWTH / MIB), "MiB"),
        Bar("progress that went back or did not add up", lies, 0),
    ]
    notes = {
        "chunks/s": round(rate, 1),
        "alone, before and after": " ".join(f"{each:.1f}" for each in alone),
        **{f"RSS at {share} %": f"{resident // MIB} MiB (store {kept // MIB})" for share, (resident, kept) in watch.memory.items()},
        "chunks": stored,
    }
    return Outcome("ingest: abstracts", watch.documents, seed, bars, notes)


async def _found(service: Service, queries: list[dict[str, str]], judged: dict[str, dict[str, int]], documents: int, seed: str) -> Outcome:
    gains: dict[str, list[float]] = {}
    recalled: list[float] = []
    for name, mode in (("hybrid", HYBRID), ("dense", DENSE), ("sparse", SPARSE)):
        gains[name] = []
        for row in queries:
            hits = await service.search(row["text"], "scifact", limit=100, mode=mode)
            ranked = list(dict.fromkeys(hit.hit.source_uri for hit in hits))
            gains[name].append(ndcg(ranked, judged[row["_id"]]))
            if mode == HYBRID:
                recalled.append(recall(ranked, judged[row["_id"]]))
    single = max(mean(gains["dense"]), mean(gains["sparse"]))
    bars = [
        Bar("nDCG@10, above the better single ranking", round(mean(gains["hybrid"]) - single, 4), GAIN, at_least=True),
        Bar("Recall@100", round(mean(recalled), 4), RECALL_MIN, at_least=True),
    ]
    notes = {name: f"{mean(each):.4f} (even {mean(each[::2]):.4f}, odd {mean(each[1::2]):.4f})" for name, each in gains.items()}
    return Outcome("scifact: nDCG@10", len(queries), seed, bars, {**notes, "documents": documents})


async def spans(run: Run) -> list[Outcome]:
    """How much of what answers a question is found, and how much else, beside chunks of a fixed size."""
    folder = run.data / "retrieval" / "chunk_spans"
    questions = list(_lines(folder / "questions.jsonl"))
    questions = run.random("spans").sample(questions, min(run.n, len(questions)))
    texts = {path.stem: path.read_bytes().decode() for path in sorted(folder.glob("*.md"))}
    async with scratch() as state:
        embedder = await asyncio.to_thread(MiniLmEmbedder.load, MODELS, QUANT)
        try:
            async with filling(state) as fill:
                for name, text in texts.items():
                    chunks = _fixed(text, WordPieces(next(MODELS.glob(f"minilm-l6-v2-{QUANT}-*")) / "tokenizer.json").count)
                    embedded = await embedder.embed_texts([chunk.text for chunk in chunks])
                    await fill.add("fixed", name, chunks, embedded.vectors, embedded.sketches or ())
        finally:
            embedder.close()
        async with serving(state) as service:
            await service.ingest([File(name, text.encode(), "", PLAIN) for name, text in texts.items()], "own")
            for document in await service.documents("own"):
                assert document.characters == len(texts[document.source_uri]), "offsets are not those of the file"
            figures = {name: await _spans_found(service, questions, name) for name in ("own", "fixed")}
    (share, precision), (fixed_share, fixed_precision) = figures["own"], figures["fixed"]
    bars = [
        Bar(f"reference characters in the top {TOP}", round(share, 4), round(fixed_share, 4), at_least=True),
        Bar("retrieved characters that are reference", round(precision, 4), round(fixed_precision, 4), at_least=True),
    ]
    return [Outcome("spans: limits are fixed 256-token chunks", len(questions), run.seed, bars, {"overlap": FIXED_OVERLAP})]


async def _spans_found(service: Service, questions: list[dict[str, Any]], collection: str) -> tuple[float, float]:
    shares, precisions = [], []
    for question in questions:
        wanted = [(reference["start_index"], reference["end_index"]) for reference in question["references"]]
        hits = [row.hit for row in await service.search(question["question"], collection, limit=TOP)]
        right: list[Span] = [(hit.start, hit.end) for hit in hits if hit.source_uri == question["corpus"]]
        both = common(right, wanted)
        shares.append(both / length(wanted))
        wrong = [(hit.source_uri, hit.start, hit.end) for hit in hits if hit.source_uri != question["corpus"]]
        precisions.append(both / max(1, length(right) + sum(end - start for _, start, end in wrong)))
    return mean(shares), mean(precisions)


def _fixed(text: str, count: Callable[[Sequence[str]], list[int]]) -> list[Chunk]:
    """Stretches of whole words of FIXED_TOKENS tokens, each beginning within the one before."""
    ends = list(itertools.accumulate(len(word) for word in text.split(" ")))
    words = [(end + place - len(word), end + place) for place, (end, word) in enumerate(zip(ends, text.split(" "), strict=True))]
    sizes = count([text[start:end] for start, end in words])
    chunks: list[Chunk] = []
    first = 0
    while first < len(words):
        last, tokens = first, 0
        while last < len(words) and (last == first or tokens + sizes[last] <= FIXED_TOKENS):
            tokens += sizes[last]
            last += 1
        start, end = words[first][0], words[last - 1][1]
        chunks.append(Chunk(len(chunks), text[start:end], start, end))
        if last == len(words):
            break
        again, back = 0, last
        while back > first + 1 and again + sizes[back - 1] <= FIXED_TOKENS * FIXED_OVERLAP:
            back -= 1
            again += sizes[back]
        first = back
    return chunks


async def xquad(run: Run) -> list[Outcome]:
    """The right paragraph in three languages, fused and by words alone."""
    folder = run.data / "retrieval" / "xquad"
    contexts, questions = (list(_lines(folder / f"{name}.jsonl.gz")) for name in ("contexts", "questions"))
    bars, asked = [], 0
    async with scratch() as state, serving(state) as service:
        for language in sorted({row["lang"] for row in contexts}):
            files = [File(row["_id"], row["text"].encode(), "", PLAIN) for row in contexts if row["lang"] == language]
            await service.ingest(files, language)
            some = [row for row in questions if row["lang"] == language]
            some = run.random(f"xquad {language}").sample(some, min(run.n, len(some)))
            asked += len(some)
            found = {}
            for mode in (HYBRID, SPARSE):
                right = 0
                for row in some:
                    hits = await service.search(row["text"], language, limit=PARAGRAPH_TOP, mode=mode)
                    right += row["context_id"] in [hit.hit.source_uri for hit in hits]
                found[mode] = round(right / len(some), 4)
            bars.append(Bar(f"{language}: right paragraph in the top {PARAGRAPH_TOP}", found[HYBRID], found[SPARSE], at_least=True))
    return [Outcome("xquad: limits are words alone", asked, run.seed, bars, {"paragraphs a language": len(contexts) // len(bars)})]


async def latency(run: Run) -> list[Outcome]:
    """How long a search takes among many chunks, its question embedded, for one caller and for eight."""
    questions = [row["text"] for row in _lines(run.data / "retrieval" / "scifact" / "queries.jsonl")]
    bars = []
    async with _among(run, run.n) as service:
        await _spread(service, questions[:50], 1)
        for callers in (1, 8):
            times = await _spread(service, [*itertools.islice(itertools.cycle(questions), SEARCHES)], callers)
            name = f"{callers} caller{'s' * (callers > 1)}"
            bars.append(Bar(f"{name}, p50", round(percentile(times, 0.5), 1), P50_MS, "ms"))
            bars.append(Bar(f"{name}, p99", round(percentile(times, 0.99), 1), P99_MS, "ms"))
    return [Outcome("latency: chunks searched", run.n, run.seed, bars, {"searches each": SEARCHES})]


async def beside(run: Run) -> list[Outcome]:
    """How long a search takes while many chunks are being taken in, against the same searches when nothing is."""
    questions = [row["text"] for row in _lines(run.data / "retrieval" / "scifact" / "queries.jsonl")]
    rows_ = list(_lines(run.data / "retrieval" / "scifact" / "corpus.jsonl.gz"))
    async with _among(run, run.n) as service:
        await _spread(service, questions[:50], 1)
        idle = []
        for question in itertools.islice(itertools.cycle(questions), SEARCHES // 2):
            idle.append(await service.timed(question, "many"))
            await asyncio.sleep(PAUSE_S)
        texts = itertools.cycle(row["text"] for row in rows_)
        # One abstract is too little for a document here; ten of them make about twenty chunks.
        files = [File(f"part {number}", "\n\n".join(itertools.islice(texts, 10)).encode(), "", PLAIN) for number in range(-(-run.n // 20))]
        busy = []
        async with asyncio.TaskGroup() as group:
            taking = group.create_task(service.ingest(files, "incoming"))
            asked = itertools.cycle(questions)
            while not taking.done():
                busy.append(await service.timed(next(asked), "many"))
                await asyncio.sleep(PAUSE_S)
        last = taking.result()
    ends = Counter(f"{said.stage} {said.error_reason}".strip() for said in last.values())
    assert ends.keys() == {"indexed"}, f"documents ended as {dict(ends)}"
    chunks = sum(said.chunks_total for said in last.values())
    times = percentile(busy, 0.99) / percentile(idle, 0.99)
    notes = {
        "idle p50 p99": f"{percentile(idle, 0.5):.1f} {percentile(idle, 0.99):.1f} ms",
        "busy p50 p99": f"{percentile(busy, 0.5):.1f} {percentile(busy, 0.99):.1f} ms",
        "searches meanwhile": len(busy),
    }
    return [
        Outcome(
            "beside: chunks taken in meanwhile", chunks, run.seed, [Bar("p99, in multiples of idle", round(times, 2), BESIDE_TIMES)], notes
        )
    ]


@contextlib.asynccontextmanager
async def _among(run: Run, count: int) -> AsyncIterator[Service]:
    """A service with `count` different chunks of real words in the collection `many`.

    Embedding so many would take half an hour: their vectors are sums of one random vector a word, so that what shares words is near, as it
    is with real ones. Among random vectors nothing is near, and copies of a text have to be told apart: both would be slower than life.
    The same vectors are those of their tokens, of which there are as many as in life.
    """
    count_tokens = WordPieces.published().count
    texts = _stretches([row["text"] for row in _lines(run.data / "retrieval" / "scifact" / "corpus.jsonl.gz")])
    chance = np.random.default_rng(int(run.seed, 16))
    of_words: defaultdict[str, np.ndarray[Any, Any]] = defaultdict(lambda: chance.standard_normal(DIMENSION).astype(np.float32))
    async with scratch() as state:
        async with filling(state) as fill:
            for begin in range(0, count, CHUNKS_PER_DOCUMENT):
                some = list(itertools.islice(texts, min(CHUNKS_PER_DOCUMENT, count - begin)))
                assert some, "there are not so many stretches of text"
                vectors = np.stack([np.sum([of_words[word] for word in {*text.casefold().split()}], axis=0) for text in some])
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                lengths = [min(length + 2, TOKENS_MAX) for length in count_tokens(some)]
                words = [itertools.cycle(text.casefold().split()) for text in some]
                tokens = [of_words[next(each)] for each, length in zip(words, lengths, strict=True) for _ in range(length)]
                chunks = [Chunk(place, text, place * 1000, place * 1000 + len(text)) for place, text in enumerate(some)]
                await fill.add("many", f"part {begin}", chunks, vectors, sketched(np.stack(tokens), lengths))
        async with serving(state) as service:
            yield service


def _stretches(texts: Sequence[str]) -> Iterator[str]:
    """All stretches of four sentences, then of three, then of two: each begins or ends elsewhere."""
    sentences = [SENTENCE_END.split(text) for text in texts]
    for count in (4, 3, 2):
        for of_text in sentences:
            for begin in range(len(of_text) - count + 1):
                yield " ".join(of_text[begin : begin + count])[:900]


async def _spread(service: Service, questions: list[str], callers: int) -> list[float]:
    return await side_by_side(len(questions), callers, lambda place: service.timed(questions[place], "many"))


async def hostile(run: Run) -> list[Outcome]:
    """Good files are found by a sentence from their middle, bad ones are refused with a reason, and neither costs much."""
    notes = {row["file"]: row["note"] for row in _lines(run.data / "docs" / "manifest.jsonl")}
    harmful = await asyncio.to_thread(bombs)
    files = [*((name, (run.data / "docs" / name).read_bytes()) for name in notes), *harmful.items()][: run.n]
    lost, untyped, wordless, slowest = [], [], [], (0.0, "")
    reasons: Counter[str] = Counter()
    async with scratch() as state, serving(state) as service, looking(service.process) as peak:
        for name, content in files:
            began = time.monotonic()
            (said,) = (await service.ingest([File(name, content)], "files")).values()
            slowest = max(slowest, (time.monotonic() - began, name))
            bad = name in harmful or notes[name] in MUST_FAIL
            if said.stage == "failed":
                reasons[said.error_reason] += 1
                typed = said.error_reason == "DOCUMENT_REJECTED" and said.error_detail
                (untyped if not typed else lost if not (bad or notes[name] in MAY_FAIL) else []).append(name)
            elif bad:
                untyped.append(name)
            else:
                chunks = await service.chunks(said.document_id)
                if not any(WORD.search(chunk.text) for chunk in chunks):
                    wordless.append(name)
                elif not await _middle_found(service, said.document_id, chunks):
                    lost.append(name)
        alive = service.process.is_running() and bool(await service.documents("files"))
    bars = [
        Bar("good files not found by their middle", len(lost), 0),
        Bar("bad files without a typed error", len(untyped), 0),
        Bar("most memory of a reading process", round(peak.bytes / MIB), WORKER_MIB, "MiB"),
        Bar("longest time for a file", round(slowest[0], 1), FILE_S, "s"),
        Bar("service alive afterwards", float(alive), 1, at_least=True),
    ]
    facts = {"refused": dict(reasons), "slowest": slowest[1]}
    facts |= {"not found": lost or "none", "not typed": untyped or "none", "without words": wordless or "none"}
    return [Outcome("hostile: files", len(files), run.seed, bars, facts)]


class Peak:
    """The most memory that a child of a process ever had, as the kernel remembers it."""

    bytes = 0

    def look(self, parent: psutil.Process) -> None:
        """Ask about every child that is there now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in parent.children(recursive=True):
                with contextlib.suppress(OSError, IndexError):  # it has just ended
                    status = Path(f"/proc/{child.pid}/status").read_text()
                    self.bytes = max(self.bytes, int(status.split("VmHWM:")[1].split()[0]) * 1024)


@contextlib.asynccontextmanager
async def looking(parent: psutil.Process) -> AsyncIterator[Peak]:
    """Look again and again until left."""
    peak = Peak()

    async def look() -> None:
        while True:
            peak.look(parent)
            await asyncio.sleep(LOOK_S)

    task = asyncio.create_task(look())
    try:
        yield peak
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _middle_found(service: Service, id_: str, chunks: list[pb.Chunk]) -> bool:
    """Whether a search for a sentence from the middle of the document brings a place that has it among the first three."""
    text = chunks[len(chunks) // 2].text
    sentence = middle_sentence(text)
    hits = [row.hit for row in await service.search(sentence, "files", limit=3)]
    return any(hit.document_id == id_ and sentence in hit.text for hit in hits)


def middle_sentence(text: str) -> str:
    """A line from the middle of a text, or what a full stop leaves of it; the longest near the middle if that is very short."""
    parts = [part.strip() for line in text.splitlines() for part in line.split(". ") if part.strip()]
    around = parts[max(0, len(parts) // 2 - 2) : len(parts) // 2 + 3]
    return max(around, key=len)[:300]


async def versions(run: Run) -> list[Outcome]:
    """No answer rests on what was replaced or deleted."""
    async with running(TAILRACE_RETRIEVAL_INGEST_LEASE_S=ingestion_faults.LEASE_S) as suite:
        found = await ingestion_faults.versions(suite, run.n, int(run.seed, 16) % 10**6)
    bars = [Bar("answers from the old version", found.pop("answers_from_the_old_version"), 0)]
    return [Outcome("versions: changes under load", found.pop("n"), run.seed, bars, found)]


async def kill(run: Run) -> list[Outcome]:
    """kill -9 while documents are taken in: the job ends, and its chunks are those of a run that nothing happened to."""
    async with running(TAILRACE_RETRIEVAL_INGEST_LEASE_S=ingestion_faults.LEASE_S) as suite:
        found = await ingestion_faults.kill(suite, run.n, int(run.seed, 16) % 10**6)
    bars = [
        Bar("jobs that ended", found.pop("jobs_that_ended"), found["n"], at_least=True),
        Bar("collections with chunks missing or twice", found.pop("collections_that_differ"), 0),
    ]
    return [Outcome("kill: -9 during ingestion", found.pop("n"), run.seed, bars, found)]


SCENARIOS: dict[str, tuple[Callable[[Run], Awaitable[list[Outcome]]], int]] = {
    "scifact": (scifact, 5183),
    "spans": (spans, 276),
    "xquad": (xquad, 1000),
    "latency": (latency, 50_000),
    "beside": (beside, 20_000),
    "hostile": (hostile, 1000),
    "versions": (versions, 200),
    "kill": (kill, 20),
}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, packed or not."""
    raw: Iterable[bytes] = gzip.decompress(path.read_bytes()).splitlines() if path.suffix == ".gz" else path.read_bytes().splitlines()
    return (orjson.loads(line) for line in raw if line.strip())


async def run_all(data: Path, names: list[str], n: int | None, seed: str) -> bool:
    """Run scenarios one after the other and print them. Return whether every bar was reached."""
    good = True
    _say(f"seed {seed} (replay: SEED={seed} make bench-retrieval DATA=…), {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    for name in names:
        scenario, full = SCENARIOS[name]
        began = time.monotonic()
        outcomes = await scenario(Run(data, n or full, seed))
        for outcome in outcomes:
            _say(*rows(outcome, time.monotonic() - began))
            good &= not outcome.failed
    return good


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"which ones; without any, all of: {', '.join(SCENARIOS)}")
    parser.add_argument("--n", type=int, help="how many instead of the full number")
    parser.add_argument("--seed", default=seed_of_run(), help="eight hexadecimal digits, to replay a run; or SEED in the environment")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - SCENARIOS.keys():
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    if options.n is not None and options.n < 1:
        parser.error("--n is at least 1")
    if not (options.data / "retrieval").is_dir():
        parser.error(f"{options.data} holds no folder `retrieval`")
    try:
        int(options.seed, 16)
    except ValueError:
        parser.error("--seed is a hexadecimal number")
    sys.exit(not asyncio.run(run_all(options.data.resolve(), options.scenarios or list(SCENARIOS), options.n, options.seed)))


if __name__ == "__main__":
    main()
