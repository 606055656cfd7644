"""Building the graph of a shard that nobody has open, in a process of its own: the engine holds the interpreter for all of it.

    python -m services.retrieval.edge_building FOLDER PARENT_PID

What is searched by it is a graph of links (HNSW) over vectors rounded to 8 bits; the whole vectors, read for the best of them, decide.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import orjson
import qdrant_edge as edge

import services
from services.chassis.processes import end_of
from services.retrieval.edge_folders import sync
from services.retrieval.niceness import give_way_whole
from services.retrieval.parsers.confinement import die_with

BUILD_S_MAX = 3600.0
LINKS = 16
CANDIDATES_BUILDING = 100
GRAPH_FROM_KIB = 30_000
"""Where a filter leaves no more vectors than fill this (20,000 of MiniLM), each is looked at, rounded: in that, too, two milliseconds, and
none is missed. A graph that most of the way leads over what the filter excludes found 94 of 100 of the ten nearest."""
INDEXED_FROM_KIB = 1000
"""What was written since the last time and fills more than this gets a graph as well."""
SEGMENTS = 4
"""A search asks each. Fewer would be built anew, whole, more often."""


async def build(folder: Path) -> None:
    """Build the shard in `folder` in a process that gives way to everything else. Raises OSError if that fails or takes too long.

    Cancellation: the process is ended; what it leaves is of no use.
    """
    process = _process(folder)
    ended = end_of(process)
    try:
        async with asyncio.timeout(BUILD_S_MAX):
            returncode = await asyncio.shield(ended)
    except TimeoutError:
        raise OSError(f"building the graph took longer than {BUILD_S_MAX:.0f} s") from None
    finally:
        process.kill()  # which does nothing to one that has ended
        await asyncio.shield(ended)
    if returncode:
        raise OSError(f"building the graph ended with {returncode}")


def _process(folder: Path) -> "subprocess.Popen[bytes]":
    """Not by the event loop's own means: see `parsing`. It sees nothing of the service's environment, which holds keys."""
    command = (sys.executable, "-B", "-P", "-s", "-m", "services.retrieval.edge_building", str(folder), str(os.getpid()))
    paths = {"PYTHONPATH": str(Path(services.__file__).parents[1]), "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, env=paths)


def main() -> None:
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    give_way_whole()
    shard = edge.EdgeShard.load(str(folder), _config(folder))
    shard.optimize()
    shard.flush()
    shard.close()
    sync(folder)


def _config(folder: Path) -> edge.EdgeConfig:
    """As the shard was made, and what its graph is to be like. The engine takes no part of a configuration, but it keeps it as a file."""
    kept = orjson.loads((folder / "edge_config.json").read_bytes())
    # No further graphs for single tenants and collections (`payload_m`): with the search parameters of edge_store they add nothing.
    graph = edge.HnswIndexConfig(
        m=LINKS, payload_m=0, ef_construct=CANDIDATES_BUILDING, full_scan_threshold=GRAPH_FROM_KIB, max_indexing_threads=1
    )
    rounded = edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8, quantile=0.99, memory=edge.Memory.Pinned)
    return edge.EdgeConfig(
        vectors={
            name: edge.EdgeVectorParams(size=vector["size"], distance=edge.Distance.Cosine, quantization_config=rounded, hnsw_config=graph)
            for name, vector in kept["vectors"].items()
        },
        sparse_vectors={name: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf) for name in kept.get("sparse_vectors", {})},
        optimizers=edge.EdgeOptimizersConfig(default_segment_number=SEGMENTS, indexing_threshold=INDEXED_FROM_KIB),
        max_search_threads=1,
    )


if __name__ == "__main__":
    main()
