"""How many chunks a second the embedder makes when nothing else is done: `python -m bench.embedder_alone` with chunks on standard input.

A process of its own, because the service's embedder has one of its own as well. Standard input is a JSON array of texts.
"""

import asyncio
import sys
import time

import orjson

from bench.retrieval_ground import MODELS, QUANT
from services.retrieval.ingest import CHUNKS_PER_STEP
from services.retrieval.minilm_embedder import MiniLmEmbedder

WARM_UP = 16


async def main(texts: list[str]) -> None:
    embedder = await asyncio.to_thread(MiniLmEmbedder.load, MODELS, QUANT)
    try:
        await embedder.embed_texts(texts[:WARM_UP])
        began = time.perf_counter()
        for begin in range(0, len(texts), CHUNKS_PER_STEP):
            await embedder.embed_texts(texts[begin : begin + CHUNKS_PER_STEP])
        sys.stdout.write(f"{len(texts) / (time.perf_counter() - began)}\n")
    finally:
        embedder.close()


if __name__ == "__main__":
    asyncio.run(main(orjson.loads(sys.stdin.buffer.read())))
