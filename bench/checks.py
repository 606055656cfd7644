"""`make bench-checks DATA=…`: what the checks of answers find and what they spare, and what the extractive model answers and declines,
beside their bars.

DATA is a folder with `grounding`, `retrieval/scifact`, `retrieval/xquad` and `docs`. Thresholds were chosen on one half of the claims and
questions, by a hash of their text; what is held against a bar is the other half. Nothing of DATA is kept.
"""

import argparse
import asyncio
import gzip
import hashlib
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from bench.ground import Bar, Outcome, seed_of_run
from bench.grounding_pairs import Pair, right_and_wrong
from bench.retrieval_figures import mean
from bench.retrieval_ground import KEY, MODELS, QUANT, WHO, File, Service, scratch, serving
from bench.scenarios_command import rows
from services.chassis.channel import Caller
from services.chassis.passport import Passport
from services.chassis.principal import set_current
from services.orchestrator.citations import CitationReader
from services.orchestrator.clients import RemoteMemory
from services.orchestrator.compose import compose, read_template
from services.orchestrator.domain import Candidate, Draft, Passage
from services.orchestrator.extractive_model import ExtractiveModel
from services.orchestrator.grounding import GROUNDEDNESS_MIN, SUPPORT_MIN, Evidence, support
from services.orchestrator.standalone import language
from services.retrieval.minilm_embedder import MiniLmEmbedder

Z_95 = 1.96
FLAGGED_MIN, SPARED_MAX = 0.90, 0.10
RIGHT_MIN, DECLINED_MIN = 0.80, 0.70
PASSAGES = 8
"""As the orchestrator asks for by default."""
PROMPT_TOKENS = 65_536
CALLS = 4
SENTENCES = 3
"""Of an answer that is put together to see how often a whole answer is flagged."""
READABLE = (".md", ".txt", ".html", ".docx", ".pdf", ".csv", ".eml", ".rst", ".pptx", ".xlsx", ".odt", ".rtf")


@dataclass(frozen=True, slots=True)
class Run:
    """What a scenario is given."""

    data: Path
    n: int
    seed: str

    def random(self, scenario: str) -> random.Random:
        return random.Random(f"{self.seed}:{scenario}")


@dataclass(frozen=True, slots=True)
class Share:
    """How many of how many."""

    hits: int
    of: int

    @classmethod
    def of_all(cls, found: Iterable[bool]) -> "Share":
        all_found = list(found)
        return cls(sum(all_found), len(all_found))

    @property
    def share(self) -> float:
        return self.hits / self.of if self.of else 0.0

    def __str__(self) -> str:
        """The share with the 95 % interval of Wilson."""
        if not self.of:
            return "none"
        z2 = Z_95**2
        middle = (self.share + z2 / (2 * self.of)) / (1 + z2 / self.of)
        spread = Z_95 * (self.share * (1 - self.share) / self.of + z2 / (4 * self.of**2)) ** 0.5 / (1 + z2 / self.of)
        return f"{100 * self.share:.1f} % [{100 * (middle - spread):.1f}-{100 * (middle + spread):.1f}] of {self.of}"


def reported(text: str) -> bool:
    """Whether a text is of the half that no threshold was chosen on."""
    return hashlib.sha256(text.encode()).digest()[-1] % 2 == 1


async def grounding(run: Run) -> list[Outcome]:
    """Sentences with their own passage and with another document's: how many are flagged."""
    chance = run.random("grounding")
    pairs = right_and_wrong(run.data, chance)
    if run.n < len(pairs):
        pairs = chance.sample(pairs, run.n)
    began = time.process_time()
    judged = [(pair, support(pair.sentence, Evidence((pair.passage,)))) for pair in pairs]
    each_us = (time.process_time() - began) / max(1, len(judged)) * 1e6

    def flagged(*kinds: str, follows: bool, half: bool | None = True) -> Share:
        return Share.of_all(
            value is not None and value < SUPPORT_MIN
            for pair, value in judged
            if pair.kind in kinds and pair.follows is follows and (half is None or reported(str(pair.claim_id)) is half)
        )

    both = ("claim", "quote")
    swapped, right = flagged(*both, follows=False), flagged(*both, follows=True)
    own_words = flagged("claim", follows=True)
    whole = _whole_answers([(pair, value) for pair, value in judged if pair.kind in both], chance)
    return [
        Outcome(
            "sentences and what they cite",
            len(judged),
            run.seed,
            [
                Bar("share of swapped citations flagged", round(swapped.share, 4), FLAGGED_MIN, at_least=True),
                Bar("share of right citations flagged", round(right.share, 4), SPARED_MAX),
                Bar("… of those in somebody's own words", round(own_words.share, 4), SPARED_MAX),
            ],
            {
                "swapped": swapped,
                "right": right,
                "swapped, own words": flagged("claim", follows=False),
                "right, own words": own_words,
                "both halves, swapped": flagged(*both, follows=False, half=None),
                "both halves, right": flagged(*both, follows=True, half=None),
                "a figure changed": flagged("figure", follows=False, half=None),
                "a `not` put in": flagged("negation", follows=False, half=None),
                "contradicted in other words": flagged("contradicted", follows=False, half=None),
                f"answers of {SENTENCES} with all swapped": whole[False],
                f"answers of {SENTENCES} with all right": whole[True],
                "us each": round(each_us),
            },
        )
    ]


def _whole_answers(judged: Sequence[tuple[Pair, float | None]], chance: random.Random) -> dict[bool, Share]:
    """How many answers of sentences that all follow, or all do not, get the verdict `ungrounded`."""
    shares = {}
    for follows in (False, True):
        values = [value for pair, value in judged if pair.follows is follows and value is not None]
        answers = [[value >= SUPPORT_MIN for value in chance.sample(values, SENTENCES)] for _ in range(1000)] if values else []
        shares[follows] = Share.of_all(mean([float(good) for good in answer]) < GROUNDEDNESS_MIN for answer in answers)
    return shares


async def dense(run: Run) -> list[Outcome]:
    """What vectors would add to words: the same pairs by the cosine of sentence and passage, alone and together with the words."""
    chance = run.random("dense")
    pairs = [pair for pair in right_and_wrong(run.data, chance) if pair.kind == "claim"]
    pairs = chance.sample(pairs, min(run.n, len(pairs)))
    embedder = await asyncio.to_thread(MiniLmEmbedder.load, MODELS, QUANT)
    try:
        cosines = []
        for pair in pairs:
            vectors = np.asarray((await embedder.embed_texts([pair.sentence, pair.passage.text])).vectors)
            cosines.append(float(vectors[0] @ vectors[1]))
    finally:
        embedder.close()
    words = [support(pair.sentence, Evidence((pair.passage,))) or 0.0 for pair in pairs]
    together = [cosine + word for cosine, word in zip(cosines, words, strict=True)]
    notes = {name: _flagged_at(SPARED_MAX, pairs, values) for name, values in (("words", words), ("cosine", cosines), ("both", together))}
    return [
        Outcome(f"swapped citations flagged, {100 * SPARED_MAX:.0f} % of the right ones being flagged", len(pairs), run.seed, [], notes)
    ]


def _flagged_at(share: float, pairs: Sequence[Pair], values: Sequence[float]) -> Share:
    right = sorted(value for pair, value in zip(pairs, values, strict=True) if pair.follows)
    threshold = right[int(share * len(right))] if right else 0.0
    return Share.of_all(value < threshold for pair, value in zip(pairs, values, strict=True) if not pair.follows)


async def extractive(run: Run) -> list[Outcome]:
    """Claims and questions asked of their own collection and of foreign ones, through real retrieval and the real model."""
    folder = run.data / "retrieval"
    claims = list(_lines(run.data / "grounding" / "scifact_claims.jsonl.gz"))
    relevant: dict[str, set[str]] = defaultdict(set)
    for row in claims:
        if row["label"] != "NOT_ENOUGH_INFO":
            relevant[row["claim"]].add(row["doc_id"])
    # What is asked for stays in, so that a short run is an easier one, but not a meaningless one.
    wanted = {row["doc_id"] for row in claims}
    abstracts = sorted(_lines(folder / "scifact" / "corpus.jsonl.gz"), key=lambda row: row["_id"] not in wanted)[: run.n]
    questions = [row for row in _lines(folder / "xquad" / "questions.jsonl.gz") if row["lang"] == "en"]
    contexts = [row for row in _lines(folder / "xquad" / "contexts.jsonl.gz") if row["lang"] == "en"]
    async with scratch() as state, serving(state) as service:
        await service.ingest([File(row["_id"], row["text"].encode(), row["title"], "text/plain") for row in contexts], "xquad")
        files = [path for path in sorted((run.data / "docs").iterdir()) if path.suffix in READABLE]
        await service.ingest([File(path.name, path.read_bytes()) for path in files], "docs")
        await service.ingest([File(row["_id"], row["text"].encode(), row["title"], "text/plain") for row in abstracts], "scifact")
        asking = _Asking(service)
        all_claims = sorted({row["claim"] for row in claims})
        of_claims = await asking.all([(claim, "scifact") for claim in sorted(relevant)])
        of_questions = await asking.all([(row["text"], "xquad") for row in questions])
        foreign = {
            "claims asked of the docs": await asking.all([(claim, "docs") for claim in all_claims]),
            "questions asked of SciFact": await asking.all([(row["text"], "scifact") for row in questions]),
        }

    def right(half: bool) -> Share:
        return Share.of_all(bool(said.cited & relevant[said.question]) for said in of_claims if reported(said.question) is half)

    def declined(answers: list[_Said], half: bool) -> Share:
        return Share.of_all(not said.cited for said in answers if reported(said.question) is half)

    contexts_of = {row["text"]: row for row in questions}
    other_half = {f"{name}, chosen on": declined(answers, half=False) for name, answers in foreign.items()}
    return [
        Outcome(
            "the extractive model",
            sum(map(len, (of_claims, of_questions, *foreign.values()))),
            run.seed,
            [
                Bar("share of claims that cite the right document", round(right(half=True).share, 4), RIGHT_MIN, at_least=True),
                *(
                    Bar(f"share of {name} declined", round(declined(answers, half=True).share, 4), DECLINED_MIN, at_least=True)
                    for name, answers in foreign.items()
                ),
            ],
            {
                "right": right(half=True),
                **{name: declined(answers, half=True) for name, answers in foreign.items()},
                "right, chosen on": right(half=False),
                **other_half,
                "claims declined": declined(of_claims, half=True),
                "questions that cite the right paragraph": Share.of_all(
                    contexts_of[said.question]["context_id"] in said.cited for said in of_questions if reported(said.question)
                ),
                "… and hold the answer": Share.of_all(
                    any(answer["text"].casefold() in said.text.casefold() for answer in contexts_of[said.question]["answers"])
                    for said in of_questions
                    if reported(said.question)
                ),
                "questions declined": declined(of_questions, half=True),
                "sentences borne out": round(mean([said.groundedness for said in of_claims if said.groundedness is not None]), 4),
                "abstracts": len(abstracts),
            },
        )
    ]


@dataclass(frozen=True, slots=True)
class _Said:
    """An answer of the extractive model."""

    question: str
    text: str
    cited: set[str]
    """Documents, as they were named when they were taken in."""
    groundedness: float | None


class _Asking:
    """The chain from question to answer as the orchestrator has it, with its own adapters."""

    def __init__(self, service: Service) -> None:
        self._memory = RemoteMemory(service.channel, Caller("bench", Passport(KEY.encode())), 0)
        self._model, self._template = ExtractiveModel(language), read_template()

    async def all(self, questions: Sequence[tuple[str, str]]) -> list[_Said]:
        room = asyncio.Semaphore(CALLS)

        async def one(question: str, collection: str) -> _Said:
            async with room:
                return await self._ask(question, collection)

        set_current(WHO)
        return list(await asyncio.gather(*(one(*asked) for asked in questions)))

    async def _ask(self, question: str, collection: str) -> _Said:
        recalling = self._memory.recall(question, collection, "bench", want_cached=False, passages_max=PASSAGES, held=None)
        async with recalling as recall:
            await recall.edition()
            await recall.verdict()
            passages = await recall.passages()
        draft = Draft(lambda _: None)
        prompt = compose(self._template, question, passages, (), PROMPT_TOKENS)
        await self._model.generate(prompt, Candidate("extractive", "extractive", PROMPT_TOKENS, 1024), 1024, draft)
        return _said(question, draft.text, prompt.passages)


def _said(question: str, text: str, passages: Sequence[Passage]) -> _Said:
    reader = CitationReader(passages)
    reader.read(text)
    return _Said(question, text, {passage.source_uri for passage in passages if passage.number in reader.cited}, reader.groundedness)


SCENARIOS: dict[str, tuple[Callable[[Run], Awaitable[list[Outcome]]], int]] = {
    "grounding": (grounding, 100_000),
    "dense": (dense, 1_000),
    "extractive": (extractive, 5_183),
}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


async def run_all(data: Path, names: list[str], n: int | None, seed: str) -> bool:
    """Run scenarios one after the other and print them. Return whether every bar was reached."""
    good = True
    _say(f"seed {seed} (replay: SEED={seed} make bench-checks DATA=…), {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    for name in names:
        scenario, full = SCENARIOS[name]
        began = time.monotonic()
        for outcome in await scenario(Run(data, n or full, seed)):
            _say(*rows(outcome, time.monotonic() - began))
            good &= not outcome.failed
    return good


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"which ones; without any, all of: {', '.join(SCENARIOS)}")
    parser.add_argument("--n", type=int, help="how many pairs, or abstracts, instead of all")
    parser.add_argument("--seed", default=seed_of_run(), help="eight hexadecimal digits, to replay a run; or SEED in the environment")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - SCENARIOS.keys():
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    if options.n is not None and options.n < 1:
        parser.error("--n is at least 1")
    if not (options.data / "grounding").is_dir():
        parser.error(f"{options.data} holds no folder `grounding`")
    sys.exit(not asyncio.run(run_all(options.data.resolve(), options.scenarios or list(SCENARIOS), options.n, options.seed)))


if __name__ == "__main__":
    main()
