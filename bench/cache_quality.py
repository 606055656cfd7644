"""How often a cached answer is served, and how often wrongly, at each similarity, with and without the guards.

    python -m bench.cache_quality FOLDER [--share 3] [--show 0.9] [--quant int8]

FOLDER holds qqp_pairs.jsonl.gz and qqp_near_miss.jsonl: pairs of questions with a human label whether they ask the same. The labels are
noisy (word-for-word equal questions are labelled different), so `--show` prints the pairs that count as wrong at a similarity, to be read.
Nothing of FOLDER is kept.
"""

import argparse
import asyncio
import gzip
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.retrieval.guards import difference
from services.retrieval.minilm_embedder import MiniLmEmbedder

SIMILARITIES = (0.80, 0.85, 0.90, 0.92, 0.94, 0.96, 0.98)
Z_95 = 1.96


@dataclass(frozen=True)
class Pair:
    """Two questions, whether people say they ask the same, how alike they are, and what the guards say."""

    asked: str
    answered: str
    same: bool
    similarity: float
    reason: str


def wilson_upper(wrong: int, served: int) -> float:
    """Upper end of the 95 % interval of a share."""
    if not served:
        return 1.0
    share, z2 = wrong / served, Z_95**2
    middle = share + z2 / (2 * served)
    spread = Z_95 * float(np.sqrt(share * (1 - share) / served + z2 / (4 * served**2)))
    return (middle + spread) / (1 + z2 / served)


def report(name: str, pairs: list[Pair]) -> None:
    """Print one table."""
    same = sum(pair.same for pair in pairs)
    print(f"\n{name}: {len(pairs)} pairs, {same} labelled the same")
    print("similarity   no guards: served  wrong     guards: served  wrong  wrong %  upper 95 %   hit rate of the same %")
    for least in SIMILARITIES:
        near = [pair for pair in pairs if pair.similarity >= least]
        served = [pair for pair in near if not pair.reason]
        wrong = sum(not pair.same for pair in served)
        bare = f"{len(near):8d} {100 * sum(not pair.same for pair in near) / max(len(near), 1):5.1f} %"
        guarded = f"{len(served):8d} {wrong:6d} {100 * wrong / max(len(served), 1):8.2f} {100 * wilson_upper(wrong, len(served)):11.2f}"
        hits = f"{100 * sum(pair.same for pair in served) / same:16.1f}" if same else ""
        print(f"      {least:.2f}          {bare}         {guarded} {hits}")


async def measure(folder: Path, share: int, show: float, quant: str) -> None:
    with gzip.open(folder / "qqp_pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    rows = [row for row in rows if int(hashlib.sha256(row["_id"].encode()).hexdigest(), 16) % share == 0]
    near = [json.loads(line) for line in (folder / "qqp_near_miss.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = sorted({text for row in rows + near for text in (row["a"], row["b"])})
    embedder = await asyncio.to_thread(MiniLmEmbedder.load, Path(".tailrace") / "models", quant)
    try:
        vectors = (await embedder.embed_texts(texts)).vectors
    finally:
        embedder.close()
    place = {text: number for number, text in enumerate(texts)}

    def pair(row: dict[str, Any]) -> Pair:
        similarity = float(vectors[place[row["a"]]] @ vectors[place[row["b"]]])
        return Pair(row["a"], row["b"], bool(row["duplicate"]), similarity, difference(row["a"], row["b"]))

    sample = [pair(row) for row in rows]
    report("all pairs", sample)
    report("near misses", [pair(row) for row in near])
    refused = Counter(one.reason for one in sample if one.similarity >= 0.9 and one.reason)
    print("\nrefused at 0.90, by guard:", ", ".join(f"{reason} {count}" for reason, count in refused.most_common()))
    for one in sample:
        if show and one.similarity >= show and not one.reason and not one.same:
            print(f"{one.similarity:.3f}  {one.asked}  |  {one.answered}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=int, default=3, help="every so-manieth pair; 1 = all (takes minutes)")
    parser.add_argument("--show", type=float, default=0.0, help="print wrongly served pairs from this similarity on")
    parser.add_argument("--quant", choices=("int8", "fp32"), default="int8", help="precision of the embedder")
    chosen = parser.parse_args()
    asyncio.run(measure(chosen.folder, chosen.share, chosen.show, chosen.quant))
