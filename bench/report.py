"""Figures as a table for people, with the marks they are meant to reach. It measures nothing."""

from collections.abc import Iterator
from typing import Any

ADDED_P50_MS, EXACT_P50_MS, SEMANTIC_P50_MS, TOKEN_US, COLD_START_S, MEMORY_MIB = 20.0, 8.0, 20.0, 250.0, 10.0, 1024.0
"""The marks, for two cores."""


def table(figures: dict[str, Any]) -> str:
    """All figures, one a line."""
    return "\n".join(_lines(figures))


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    corpus, machine = figures["corpus"], figures["machine"]
    yield f"Tailrace on {machine['cpus']} CPUs (load {machine['load']}), {machine['platform']}, Python {machine['python']}"
    yield f"took {figures['took_s']:.0f} s"
    size = f"{corpus['chunks']:,} chunks of {corpus['documents']:,} documents"
    yield f"corpus: {size} ({corpus['source']}), taken in at {corpus['chunks_per_s']} chunks/s"
    yield f"prompt: {corpus['prompt_bytes']:,} bytes; the provider is simulated, and called directly by the same client in turns"
    yield ""
    yield _row("time to first token, cache off", "direct", "through", "added", "mark")
    for case in figures["first_token"]:
        for part in ("p50", "p95"):
            mark = _mark(case["added"]["p50"], ADDED_P50_MS, "ms") if (case["streams"], part) == (1, "p50") else ""
            values = (f"{case[kind][part]:.1f} ms" for kind in ("direct", "through", "added"))
            yield _row(f"  {case['streams']} stream{'s' * (case['streams'] > 1)}, {part} (n={case['through']['n']})", *values, mark)
    yield ""
    cpu = figures["cpu"]
    yield _row("CPU by process", "us/token", "us/request", "all-in/token", "idle us/s")
    for name, marginal in cpu["per_token_us"].items():
        idle = figures["idle"].get(name)
        own = (f"{marginal:.0f}", f"{cpu['per_request_us'][name]:,}", f"{cpu['per_token_all_in_us'][name]:.0f}")
        yield _row(f"  {name}", *own, "" if idle is None else f"{idle:,}")
    pair = ("gateway", "orchestrator")
    token, all_in = (round(sum(cpu[kind][name] for name in pair), 1) for kind in ("per_token_us", "per_token_all_in_us"))
    requests = sum(cpu["per_request_us"][name] for name in pair)
    yield _row("  gateway + orchestrator", f"{token:.0f}", f"{requests:,}", f"{all_in:.0f}", _mark(all_in, TOKEN_US, "us all-in"))
    if provider := cpu["per_token_us"].get("provider"):
        yield _row("  as multiples of the provider's own", f"{token / provider:.1f} x")
    yield f"  (paced, 20 streams; all-in = everything a {cpu['tokens_per_answer']}-token answer costs, spread over its tokens)"
    bare = figures["floor"]
    both_us = bare["server_us"] + bare["client_us"]
    yield f"  (a bare gRPC stream: server {bare['server_us']:.0f} + client {bare['client_us']:.0f} us a message, which every token crosses;"
    yield f"   gateway + orchestrator are {token / both_us:.1f} x that a token, {all_in / both_us:.1f} x all-in)"
    yield ""
    yield _row("cache hits", "first p50", "first p95", "done p50", "done p95")
    for name, limit in (("exact", EXACT_P50_MS), ("semantic", SEMANTIC_P50_MS)):
        hit = figures["hits"][name]
        if "first" in hit:
            values = (f"{hit[moment][part]:.1f} ms" for moment in ("first", "done") for part in ("p50", "p95"))
            yield _row(f"  {name} ({hit['hits']} of {hit['asked']})", *values) + "  " + _mark(hit["first"]["p50"], limit, "ms")
        else:
            yield f"  {name}: none of {hit['asked']} questions hit"
    yield ""
    yield _row("memory", "PSS MiB", "RSS MiB")
    for name, process in figures["memory"]["processes"].items():
        yield _row(f"  {name}", f"{process['pss_mib']:.0f}", f"{process['rss_mib']:.0f}")
    both = (figures["memory"]["pss_mib"], figures["memory"]["rss_mib"])
    yield _row("  all", f"{both[0]:.0f}", f"{both[1]:.0f}", _mark(both[0], MEMORY_MIB, "MiB"))
    yield ""
    start = figures["start"]
    yield _row("`make run` to its URL, nothing there yet", f"{start['first_s']:.1f} s", _mark(start["first_s"], COLD_START_S, "s"))
    yield _row("`make run` to its URL, again", f"{start['again_s']:.1f} s")


def _row(name: str, *cells: str) -> str:
    return f"{name:<40}" + "".join(f"{cell:>14}" for cell in cells)


def _mark(value: float, limit: float, unit: str) -> str:
    return f"   {'ok' if value <= limit else 'ABOVE'} (<= {limit:g} {unit})"
