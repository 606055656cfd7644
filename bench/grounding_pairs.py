"""Sentences with a passage they follow from, or do not: SciFact's claims and the sentences people found that bear them out. Pure but for
reading the files; nothing is measured here.
"""

import gzip
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from services.orchestrator.domain import Passage
from services.retrieval.chunking import chunked
from services.retrieval.parsers.plain_text import parse_plain

CHARACTERS_PER_TOKEN = 4
"""Near enough for cutting abstracts as ingestion does, without a tokenizer."""
_FIGURE = re.compile(r"(?<![\w.,-])\d{1,4}(?:\.\d+)?(?![\w.,-]*\d)(?!\w)")
_COPULA = re.compile(r"\b(is|are|was|were|can|may|will|has|have|had)\b(?! not\b)")


@dataclass(frozen=True, slots=True)
class Pair:
    """A sentence and the passage it cites."""

    kind: str
    """`claim`: in somebody's own words; `quote`: a sentence of the document itself; `contradicted`: a claim the passage speaks against;
    `figure`, `negation`: a quote with one figure changed, or with a `not` put in."""
    claim_id: int
    sentence: str
    passage: Passage
    follows: bool


def right_and_wrong(data: Path, chance: random.Random) -> list[Pair]:
    """Every claim and quote with its own passage, and with a passage of another document: about two thousand pairs.

    A claim that is neither borne out nor contradicted by its document is there with another document's passage alone.
    """
    texts = {row["_id"]: row for row in _lines(data / "retrieval" / "scifact" / "corpus.jsonl.gz")}
    rows = list(_lines(data / "grounding" / "scifact_claims.jsonl.gz"))
    documents = sorted({row["doc_id"] for row in rows})
    passages = {id_: _passages(texts[id_]) for id_ in documents}

    def elsewhere(document: str) -> Passage:
        other = document
        while other == document:
            other = chance.choice(documents)
        return chance.choice(passages[other])

    found: list[Pair] = []
    for row in rows:
        document, claim, number = row["doc_id"], row["claim"], int(row["claim_id"])
        found.append(Pair("claim", number, claim, elsewhere(document), follows=False))
        quotes = [row["sentences"][place] for rationale in row["rationales"] for place in rationale]
        placed = [(quote, passage) for quote in quotes for passage in passages[document] if _spaced(quote)[:60] in _spaced(passage.text)]
        if not placed:
            continue
        quote, passage = placed[0]
        if row["label"] == "SUPPORT":
            found.append(Pair("claim", number, claim, passage, follows=True))
        else:
            found.append(Pair("contradicted", number, claim, passage, follows=False))
        found.append(Pair("quote", number, quote, passage, follows=True))
        found.append(Pair("quote", number, quote, elsewhere(document), follows=False))
        found += _altered(Pair("quote", number, quote, passage, follows=False), chance)
    return found


def _altered(quote: Pair, chance: random.Random) -> Iterator[Pair]:
    figures = list(_FIGURE.finditer(quote.sentence))
    if figures:
        figure = chance.choice(figures)
        other = str(int(float(figure[0])) * 3 + 7)
        if other not in quote.passage.text:
            changed = quote.sentence[: figure.start()] + other + quote.sentence[figure.end() :]
            yield replace(quote, kind="figure", sentence=changed)
    if "not" not in quote.sentence and (verb := _COPULA.search(quote.sentence)):
        yield replace(quote, kind="negation", sentence=f"{quote.sentence[: verb.end()]} not{quote.sentence[verb.end() :]}")


def _passages(row: dict[str, str]) -> list[Passage]:
    def count(texts: list[str]) -> list[int]:
        return [1 + len(text) // CHARACTERS_PER_TOKEN for text in texts]

    return [
        Passage(number, row["_id"], f"{row['_id']}-{number}", row["title"], row["_id"], chunk.text, chunk.start, chunk.end, 1.0)
        for number, chunk in enumerate(chunked(parse_plain(row["text"]), count), 1)
    ]


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (orjson.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines())
