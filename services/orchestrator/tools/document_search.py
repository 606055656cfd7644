"""The tool `search_documents`: the asker's own documents, searched again in the middle of an answer, in the answer's collection only."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from services.orchestrator.domain import Passage, Question, ToolSpec
from services.orchestrator.ports import DocumentSearch
from services.orchestrator.tools.toolbox import Output

HITS_MAX = 10
HIT_CHARACTERS_MAX = 2_000
HITS_BYTES_MAX = 14_000
"""Of all of them: a little less than a result may have (`ToolLimits.result_bytes_max`)."""
PLACE_CHARACTERS_MAX = 200


class SearchDocuments:
    """The tool. What it finds is what the asking user may read: the search runs as that user."""

    spec = ToolSpec(
        "search_documents",
        "Searches the user's documents by meaning and by words. Use it when the passages you were given do not answer the question, with "
        "other words or for a part of the question. Returns numbered passages; cite them as you cite the others.",
        {
            "type": "object",
            "properties": {
                "query": {"type": "string", "minLength": 1, "maxLength": 1_000, "description": "What to look for, in plain words."},
                "limit": {"type": "integer", "minimum": 1, "maximum": HITS_MAX, "description": "How many excerpts; 5 if it is left out."},
            },
            "required": ["query"],
            "additionalProperties": False,
        },
    )
    output_schema: Mapping[str, Any] | None = None

    def __init__(self, documents: DocumentSearch) -> None:
        self._documents = documents

    async def call(self, arguments: Mapping[str, Any], asked: Question) -> Output:
        hits = await self._documents.search(arguments["query"], asked.collection, int(arguments.get("limit", 5)))
        if not hits:
            return Output("Nothing was found.")
        hits = _fitting(hits)
        return Output("\n\n".join(map(_told, hits)), passages=hits)


def _fitting(hits: Sequence[Passage]) -> tuple[Passage, ...]:
    """The best hits, each and all of them within bounds, so that none is cut in the middle and loses its number."""
    kept: list[Passage] = []
    left = HITS_BYTES_MAX
    for hit in hits:
        hit = replace(hit, text=hit.text[:HIT_CHARACTERS_MAX])
        left -= len(_told(hit).encode())
        if left < 0 and kept:
            break
        kept.append(hit)
    return tuple(kept)


def _told(hit: Passage) -> str:
    place = " › ".join((hit.title, *hit.heading_path))[:PLACE_CHARACTERS_MAX]
    page = f", page {hit.page}" if hit.page else ""
    return f"From {place}{page}:\n{hit.text}"
