"""How well passages are found: nDCG@10 and Recall@100 by meaning, by words and fused, over a folder of queries with known answers.

    python -m bench.retrieval_quality FOLDER [--quant int8] [--documents N]

FOLDER is laid out as BEIR has it: corpus.jsonl.gz, queries.jsonl, qrels.tsv. The embedder, the word weights and the store are the
service's own; a document is one point, as in the published figures. Nothing is cached and nothing of FOLDER is kept.
"""

import argparse
import asyncio
import gzip
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from services.retrieval.domain import stable_id
from services.retrieval.edge_bm25 import EdgeBm25
from services.retrieval.edge_store import EdgeStore
from services.retrieval.minilm_embedder import MiniLmEmbedder
from services.retrieval.ports import CHUNKS, Filter, Fusion, Point, Query

TENANT = "bench"
DEPTH = 100
Judgements = dict[str, dict[str, int]]

FUSIONS = {
    "hybrid dbsf": Fusion("dbsf"),
    "hybrid rrf k=2": Fusion("rrf", rrf_k=2),
    "hybrid rrf k=10": Fusion("rrf", rrf_k=10),
    "hybrid rrf k=60": Fusion("rrf", rrf_k=60),
}


def ndcg(ranked: list[str], relevant: dict[str, int], depth: int = 10) -> float:
    """Discounted gain of the first `depth`, as a share of the best possible."""
    gained = sum(relevant.get(id_, 0) / math.log2(place + 2) for place, id_ in enumerate(ranked[:depth]))
    best = sum(gain / math.log2(place + 2) for place, gain in enumerate(sorted(relevant.values(), reverse=True)[:depth]))
    return gained / best if best else 0.0


def recall(ranked: list[str], relevant: dict[str, int], depth: int = DEPTH) -> float:
    """Share of the relevant documents among the first `depth`."""
    wanted = {id_ for id_, gain in relevant.items() if gain > 0}
    return len(wanted & set(ranked[:depth])) / len(wanted) if wanted else 0.0


def judgements(path: Path) -> Judgements:
    judged: Judgements = {}
    for line in path.read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        judged.setdefault(query, {})[document] = int(score)
    return judged


async def measure(folder: Path, quant: str, documents_max: int) -> None:
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        corpus = [json.loads(line) for line in lines][: documents_max or None]
    judged = judgements(folder / "qrels.tsv")
    queries = [row for line in (folder / "queries.jsonl").read_text().splitlines() if (row := json.loads(line))["_id"] in judged]
    with tempfile.TemporaryDirectory() as scratch:
        embedder = await asyncio.to_thread(MiniLmEmbedder.load, Path(".tailrace") / "models", quant)
        store, sparse = EdgeStore.open(Path(scratch), embedder.dimension), EdgeBm25("english")
        try:
            texts = [f"{row.get('title', '')}\n{row['text']}".strip() for row in corpus]
            dense = (await embedder.embed_texts(texts)).vectors
            points = [
                Point(stable_id("bench", row["_id"]), {"tenant": TENANT, "id": row["_id"]}, vector, sparse.document(text))
                for row, vector, text in zip(corpus, dense, texts, strict=True)
            ]
            await store.upsert(CHUNKS, points)
            asked = (await embedder.embed_texts([row["text"] for row in queries])).vectors
            where = Filter(TENANT)

            async def report(name: str, query_of: Callable[[int], Query]) -> None:
                gains, recalls = [], []
                for place, row in enumerate(queries):
                    found = [hit.payload["id"] for hit in await store.search(CHUNKS, query_of(place))]
                    gains.append(ndcg(found, judged[row["_id"]]))
                    recalls.append(recall(found, judged[row["_id"]]))
                print(f"{name:18} nDCG@10 {sum(gains) / len(gains):.4f}   Recall@{DEPTH} {sum(recalls) / len(recalls):.4f}")

            print(f"{len(corpus)} documents, {len(queries)} queries, {embedder.embedder_id}, {sparse.encoder_id}")
            words = [sparse.query(row["text"]) for row in queries]
            await report("dense", lambda place: Query(where, DEPTH, dense=asked[place]))
            await report("sparse", lambda place: Query(where, DEPTH, sparse=words[place]))
            for name, fusion in FUSIONS.items():
                await report(name, lambda place, fusion=fusion: Query(where, DEPTH, dense=asked[place], sparse=words[place], fusion=fusion))
        finally:
            store.close()
            embedder.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quant", choices=["fp32", "int8"], default="fp32")
    parser.add_argument("--documents", type=int, default=0, help="only so many documents; 0 = all")
    chosen = parser.parse_args()
    asyncio.run(measure(chosen.folder, chosen.quant, chosen.documents))
