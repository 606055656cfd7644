"""The measurements: each drives a running suite and the provider itself in turns, and returns plain figures. Nothing is printed here."""

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson

from bench.corpus import Corpus
from bench.script import Behaviour
from bench.wire import VENDORS, Call, Line, Timing, Vendor, ask_provider, ask_tailrace
from tests.suite import SERVICES, Load, Suite, events

COLLECTION = "bench"
USER, TENANT = "bench", "bench"
PROCESSES = (*SERVICES, "postgres", "valkey")
"""What a suite is made of; the provider is not part of it."""

TTFT_MS = 20.0
WARM_UP = 30
PAIRS = 150
STREAMS = 20
PACE_TOKENS_PER_S = 50.0
LONG_TOKENS, SHORT_TOKENS = 200, 20
HIT_QUESTIONS = 25
EXACT_ROUNDS = 8

ASKED = "What is known about {}?"
PARAPHRASES = (
    "Please tell me what is known about {}.",
    "What is known on {}?",
    "What do we know about {}?",
    "Could you tell me what is known about {}?",
)
"""Other words for the same question, without a change that a guard must refuse."""

Figures = dict[str, Any]


def spread(values_ms: Sequence[float]) -> Figures:
    """Percentiles of a sample in milliseconds."""
    ordered = sorted(values_ms)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
        "n": len(ordered),
    }


class Bench:
    """One suite under measurement, with a corpus to ask about. With a `vendor` its model answers, else the one of the default tier."""

    def __init__(self, suite: Suite, corpus: Corpus, vendor: Vendor | None = None) -> None:
        self._suite = suite
        self._vendor, self._model = vendor or VENDORS["anthropic"], vendor.model if vendor else ""
        self._corpus = corpus
        self._token = suite.token(USER, TENANT)
        self._topics = corpus.topics(10_000)
        if len(self._topics) <= HIT_QUESTIONS:
            raise ValueError(f"{len(corpus.documents)} documents have {len(self._topics)} subjects to ask about; more are needed")
        self._fresh = self._never_asked()
        self._direct: Call

    def _never_asked(self) -> Iterator[str]:
        """Questions that differ in meaning from each other, without end."""
        for number in itertools.count(1):
            for topic in self._topics[HIT_QUESTIONS:]:
                yield f"What did group {number} report about {topic}?"

    def _through(self, question: str, cache: str = "off") -> Call:
        return ask_tailrace(self._token, question, collection=COLLECTION, cache=cache, model=self._model)

    @asynccontextmanager
    async def _lines(self, count: int) -> AsyncIterator[tuple[list[Line], list[Line]]]:
        """Connections to the provider and to the gateway."""
        async with AsyncExitStack() as stack:
            both = []
            for port in (int(self._suite.provider.url.rpartition(":")[2]), self._suite.ports["http"]):
                lines = [await Line.open(port) for _ in range(count)]
                for line in lines:
                    stack.push_async_callback(line.aclose)
                both.append(lines)
            yield both[0], both[1]

    async def prepare(self) -> Figures:
        """Lift the limits, ingest the corpus and warm everything up."""
        async with self._suite.client("admin", TENANT, ("user", "admin")) as admin:
            (await admin.put(f"/v1/admin/subscriptions/{USER}", json={"plan": "enterprise"})).raise_for_status()
        rows = [{"title": title, "text": text, "collection": COLLECTION} for title, text in self._corpus.documents]
        began = time.perf_counter()
        final: dict[str, dict[str, Any]] = {}
        async with self._suite.client(USER, TENANT) as client:
            body = b"\n".join(map(orjson.dumps, rows))
            headers = {"content-type": "application/x-ndjson"}
            async with client.stream("POST", "/v1/documents:bulk", content=body, headers=headers, timeout=300) as response:
                response.raise_for_status()
                async for event in events(response):
                    if isinstance(event.data, dict) and "stage" in event.data:
                        final[str(event.data["index"])] = event.data
        took_s = time.perf_counter() - began
        stages = {progress["stage"] for progress in final.values()}
        assert (len(final), stages) == (len(rows), {"indexed"}), f"{len(final)} documents ended as {stages}"
        chunks = sum(int(progress["chunks_total"]) for progress in final.values())
        prompt_bytes = await self.warm_up()
        return {
            "source": self._corpus.source,
            "documents": len(rows),
            "chunks": chunks,
            "chunks_per_s": round(chunks / took_s, 1),
            "prompt_bytes": prompt_bytes,
        }

    async def warm_up(self) -> int:
        """Ask a while, and take a real prompt to send directly. Returns its bytes."""
        async with self._lines(1) as (_, (line,)):
            for _ in range(WARM_UP):
                await line.stream(self._through(next(self._fresh)))
        prompt = (await self._suite.provider.prompts())[-1]
        self._direct = ask_provider(self._vendor, prompt)
        return len(orjson.dumps(prompt))

    async def one_stream(self) -> Figures:
        """Added time to the first token, one question at a time."""
        await self._suite.provider.behave(Behaviour(ttft_ms=TTFT_MS, tokens=20))
        direct, through = [], []
        async with self._lines(1) as ((provider,), (gateway,)):
            for _ in range(PAIRS):
                direct.append(await provider.stream(self._direct))
                through.append(await gateway.stream(self._through(next(self._fresh))))
        return {"streams": 1, **_compared(direct, through)}

    async def many_streams(self) -> tuple[Figures, Figures]:
        """Paced streams side by side: added time to the first token, and CPU by process.

        Long and short answers take turns; the slope between them is what a token costs, and the rest what a request costs.
        """
        direct, through = [], []
        spent: dict[int, dict[str, float]] = {}
        requests = {LONG_TOKENS: STREAMS, SHORT_TOKENS: 4 * STREAMS}
        async with self._lines(STREAMS) as (provider, gateway):
            for tokens, each in ((LONG_TOKENS, 1), (SHORT_TOKENS, 4), (LONG_TOKENS, 1), (SHORT_TOKENS, 4)):
                await self._suite.provider.behave(Behaviour(ttft_ms=TTFT_MS, tokens=tokens, tokens_per_s=PACE_TOKENS_PER_S))
                direct += await _side_by_side(provider, [[self._direct] * each] * STREAMS)
                before = self._suite.loads()
                calls = [[self._through(next(self._fresh)) for _ in range(each)] for _ in range(STREAMS)]
                through += await _side_by_side(gateway, calls)
                used = _cpu_between(before, self._suite.loads())
                so_far = spent.setdefault(tokens, dict.fromkeys(used, 0.0))
                spent[tokens] = {name: so_far[name] + cpu_s for name, cpu_s in used.items()}
        long, short = spent[LONG_TOKENS], spent[SHORT_TOKENS]
        long_requests, short_requests = 2 * requests[LONG_TOKENS], 2 * requests[SHORT_TOKENS]
        per_token, per_request, all_in = {}, {}, {}
        for name in (*PROCESSES, "provider"):
            # cpu = requests * a + tokens * b, for both kinds of answer
            long_each, short_each = long[name] / long_requests, short[name] / short_requests
            per_token[name] = round(max(0.0, (long_each - short_each) / (LONG_TOKENS - SHORT_TOKENS)) * 1e6, 1)
            per_request[name] = round(max(0.0, short_each - SHORT_TOKENS * per_token[name] / 1e6) * 1e6)
            all_in[name] = round(long_each / LONG_TOKENS * 1e6, 1)
        cpu = {
            "tokens_per_answer": LONG_TOKENS,
            "per_token_us": per_token,
            "per_request_us": per_request,
            "per_token_all_in_us": all_in,
        }
        return {"streams": STREAMS, **_compared(direct, through)}, cpu

    async def idle(self, seconds: float = 2.0) -> Figures:
        """CPU per second when nobody asks anything, microseconds by process."""
        before = self._suite.loads()
        await asyncio.sleep(seconds)
        used = _cpu_between(before, self._suite.loads())
        return {name: round(used[name] / seconds * 1e6) for name in PROCESSES}

    async def hits(self) -> tuple[Figures, Figures]:
        """Latency of exact and of semantic hits. What should have hit and did not is counted, and left out of the latency."""
        await self._suite.provider.behave(Behaviour(ttft_ms=TTFT_MS, tokens=100))
        topics = self._topics[:HIT_QUESTIONS]
        exact: list[tuple[str, Timing]] = []
        semantic: list[tuple[str, Timing]] = []
        async with self._lines(1) as (_, (line,)):
            for topic in topics:
                await line.stream(self._through(ASKED.format(topic), "use"))
            for paraphrase in PARAPHRASES:
                for topic in topics:
                    timing = await line.stream(self._through(paraphrase.format(topic), "use"))
                    semantic.append((_verdict(timing), timing))
            for _ in range(EXACT_ROUNDS):
                for topic in topics:
                    timing = await line.stream(self._through(ASKED.format(topic), "use"))
                    exact.append((_verdict(timing), timing))
        return _hit_figures(exact, "exact"), _hit_figures(semantic, "semantic")

    def memory(self) -> Figures:
        """Memory by process, MiB. PSS counts shared pages once over all processes, so it is what may be summed."""
        loads = {name: load for name, load in self._suite.loads().items() if name in PROCESSES}
        mib = {
            name: {"pss_mib": round(load.pss_bytes / 2**20, 1), "rss_mib": round(load.rss_bytes / 2**20, 1)} for name, load in loads.items()
        }
        return {
            "processes": mib,
            "pss_mib": round(sum(load.pss_bytes for load in loads.values()) / 2**20, 1),
            "rss_mib": round(sum(load.rss_bytes for load in loads.values()) / 2**20, 1),
        }


def _compared(direct: list[Timing], through: list[Timing]) -> Figures:
    own, all_in = spread([timing.first_ms for timing in direct]), spread([timing.first_ms for timing in through])
    added = {name: round(all_in[name] - own[name], 2) for name in ("p50", "p95")}
    return {"direct": own, "through": all_in, "added": added, "ratio_p50": round(all_in["p50"] / own["p50"], 2)}


async def _side_by_side(lines: list[Line], calls: list[list[Call]]) -> list[Timing]:
    """Every line makes its calls one after the other; they begin evenly spread over one second, as people do."""

    async def work(number: int, line: Line, mine: list[Call]) -> list[Timing]:
        await asyncio.sleep(number / len(lines))
        return [await line.stream(call) for call in mine]

    done = await asyncio.gather(*(work(number, line, mine) for number, (line, mine) in enumerate(zip(lines, calls, strict=True))))
    return [timing for timings in done for timing in timings]


def _cpu_between(before: dict[str, Load], after: dict[str, Load]) -> dict[str, float]:
    return {name: max(0.0, after[name].cpu_s - before[name].cpu_s) for name in before}


def _verdict(timing: Timing) -> str:
    """The cache verdict in the answer's receipt."""
    receipt = timing.body[timing.body.rindex(b"event: done") :]
    data = next(line for line in receipt.splitlines() if line.startswith(b"data: "))
    return str(orjson.loads(data[6:])["cache"]["verdict"])


def _hit_figures(timings: list[tuple[str, Timing]], wanted: str) -> Figures:
    hits = [timing for verdict, timing in timings if verdict == wanted]
    figures: Figures = {"asked": len(timings), "hits": len(hits)}
    if hits:
        figures |= {"first": spread([timing.first_ms for timing in hits]), "done": spread([timing.done_ms for timing in hits])}
    return figures
