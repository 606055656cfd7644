"""What the orchestrator is made of: acquired from top to bottom, released in reverse. The only place where adapters meet ports."""

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import redis.asyncio as redis
import structlog

from services.chassis.afterwork import AfterWork
from services.chassis.channel import Caller, open_channel
from services.chassis.clock import Clock, SystemClock
from services.chassis.config import environment
from services.chassis.ending import ended
from services.chassis.errors import DomainError, ModelUnknown, NotAllowed, Unavailable
from services.chassis.lifecycle import Service
from services.chassis.passport import Passport
from services.chassis.redis_pool import PatientPool
from services.chassis.server import Server, passport_identity
from services.orchestrator import providers, spool, spool_gauges
from services.orchestrator.answer import produce
from services.orchestrator.clients import RemoteLedger, RemoteMemory, RemoteSearch, SpooledBooks, SpooledTurns, ping
from services.orchestrator.compose import CONTINUE_FILE, read_template
from services.orchestrator.config import OrchestratorSettings
from services.orchestrator.domain import Candidate
from services.orchestrator.errands import Errands
from services.orchestrator.extractive_model import ExtractiveModel
from services.orchestrator.health import Health
from services.orchestrator.leases import Leases
from services.orchestrator.mirrors import Mirrors, interrupted
from services.orchestrator.models_file import MODELS_FILE, read_table, reload_forever, tell_left_out
from services.orchestrator.ports import DocumentSearch, Model, SharedLogs
from services.orchestrator.publisher import Publisher
from services.orchestrator.redis_cache import RedisCache
from services.orchestrator.redis_flights import RedisFlights
from services.orchestrator.redis_logs import RedisLogs
from services.orchestrator.redis_prompts import RedisPrompts
from services.orchestrator.redis_tools import RedisPendingCalls, RedisWords
from services.orchestrator.registry import Bounds, Registry
from services.orchestrator.router import EXTRACTIVE, Router, Wish
from services.orchestrator.rpc import OrchestratorRpc, event_bytes, event_value, new_answer_id, offer
from services.orchestrator.run import Limits, Toolkit
from services.orchestrator.shadow import Shadows
from services.orchestrator.single_flight import SingleFlight
from services.orchestrator.standalone import language
from services.orchestrator.tariff import Tariff
from services.orchestrator.templates import FOLDER, read_templates
from services.orchestrator.tools.addresses import parse_hosts
from services.orchestrator.tools.calculator import Calculator
from services.orchestrator.tools.confirmations import Confirmations
from services.orchestrator.tools.current_time import CurrentTime
from services.orchestrator.tools.document_search import SearchDocuments
from services.orchestrator.tools.toolbox import Source, Tool, Toolbox, ToolLimits, Toolset

WORKS_PER_ANSWER_MAX = 8
"""Rewrite, conclusion, turn, prompts, two caches and a summary or title of an answer, and one more for those that wait for a ledger that
is away."""
REDIS_CONNECTIONS_MAX = 200
RUNNING_MARGIN_S = 120.0
"""A log that nobody ends goes this long after its answer's deadline."""
LEASES_RETURN_S = 2.0
"""How long a drain waits at least for the ledger to take leases back; what it does not take expires by itself."""
FETCH_URL = "fetch_url"
"""Known by name also where it is not switched on."""
STREAMS_SHARE = 0.8
"""Of the drain's grace, how much belongs to answers that go on; the rest is for telling and booking that they do not."""

log = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def build(settings: OrchestratorSettings) -> AsyncIterator[Service]:
    """Open everything the orchestrator needs and hand over the service."""
    async with contextlib.AsyncExitStack() as stack:
        clock = SystemClock()
        passport = Passport(settings.internal_key.get_secret_value().encode())
        replica = secrets.token_hex(8)
        tls = settings.mutual_tls()

        outbox = await stack.enter_async_context(spool.opened(settings.state_dir / "orchestrator" / "spool.db", settings.spool_records_max))
        books = SpooledBooks(outbox, replica)

        ledger_channel = await stack.enter_async_context(open_channel(settings.ledger_target, tls))
        ledger = RemoteLedger(ledger_channel, Caller(settings.ledger_target, passport), settings.restart_patience_s)
        leases = Leases(ledger, settings.credit_leases_max)
        retrieval_channel = await stack.enter_async_context(open_channel(settings.retrieval_target, tls))
        memory = RemoteMemory(retrieval_channel, Caller(settings.retrieval_target, passport), settings.restart_patience_s)

        # No retries here: the cache's own time limit is shorter than they are worth.
        pool = PatientPool.from_url(
            settings.redis_url.get_secret_value(),
            max_connections=REDIS_CONNECTIONS_MAX,
            timeout=settings.cache_timeout_s,
            socket_timeout=1.0,
            socket_connect_timeout=1.0,
            retry=None,
        )
        cache = await stack.enter_async_context(redis.Redis.from_pool(pool))
        exact = RedisCache(cache, ttl_s=settings.cache_ttl_s, timeout_s=settings.cache_timeout_s)
        search = RemoteSearch(retrieval_channel, Caller(settings.retrieval_target, passport))
        tools = open_tools(settings, stack, search, cache, clock)

        # Whoever reads another replica's log, and the listener for cancels, holds a connection that waits.
        waiting = PatientPool.from_url(
            settings.redis_url.get_secret_value(),
            max_connections=settings.mirrors_max + 1,
            timeout=settings.logs_timeout_s,
            socket_timeout=None,
            socket_connect_timeout=1.0,
            socket_keepalive=True,
            retry=None,
        )
        logs = RedisLogs(
            cache,
            await stack.enter_async_context(redis.Redis.from_pool(waiting)),
            running_life_s=int(settings.answer_deadline_s + RUNNING_MARGIN_S),
            ended_life_s=int(settings.logs_kept_s),
            lease_s=settings.lease_s,
            timeout_s=settings.logs_timeout_s,
        )

        models: dict[str, Model] = {EXTRACTIVE: ExtractiveModel(language)}
        models_file = Path(settings.models_file) if settings.models_file else MODELS_FILE
        table = read_table(models_file)
        models |= await stack.enter_async_context(providers.opened(settings, models_file))
        router = Router(table, models, settings.default_tier, random.random)
        tell_left_out(router)

        after = AfterWork(tasks_max=WORKS_PER_ANSWER_MAX * settings.answers_max)
        limits = Limits(
            deadline_s=settings.answer_deadline_s,
            prompt_tokens_max=settings.prompt_tokens_max,
            passages_max=settings.passages_max,
            history_turns_max=settings.history_turns_max,
            cache_per_user=settings.cache_scope == "user",
            output_tokens_min=settings.output_tokens_min,
            history_bytes_max=settings.history_tokens_max,
            passages_bytes_max=settings.passages_tokens_max,
            rewrites=settings.rewrites,
            titles=settings.titles,
            summaries=settings.summaries,
        )
        shelf = RedisPrompts(cache, kept_s=settings.prompts_kept_s)
        folder = settings.prompts_dir or FOLDER
        shadows = Shadows(settings.shadow_tenant, new_answer_id, random.random)
        tariff = Tariff(ledger)
        health = Health(time.monotonic, random.random)
        errands = Errands(
            ledger, books, models, lambda: errand_candidates(router, settings.errands_tier), tariff, health, clock, new_answer_id
        )
        late_turns = SpooledTurns(outbox, ledger)
        mirrors = Mirrors(logs, settings.mirrors_max)
        flights = SingleFlight(RedisFlights(cache, timeout_s=settings.cache_timeout_s), mirrors, replica, event_value)
        kit = Toolkit(
            memory,
            ledger,
            exact,
            books,
            models,
            after,
            clock,
            read_templates(settings.answer_prompts, folder),
            limits,
            leases,
            errands,
            shelf if settings.prompts_kept_s else None,
            health,
            read_template(CONTINUE_FILE),
            shadows,
            tools,
            late_turns,
            flights,
        )
        publisher = Publisher(logs, replica, event_bytes, kept_s=settings.logs_kept_s, bytes_max=settings.logs_bytes_max)
        registry = Registry(
            lambda question, events: produce(question, kit, events),
            logs,
            publisher,
            mirrors,
            ledger.knows,
            ledger.booked,
            replica,
            Bounds(
                answers_max=settings.answers_max,
                answers_per_user_max=settings.answers_per_user_max,
                kept_max=settings.logs_kept_max,
                kept_s=settings.logs_kept_s,
                detach_grace_s=settings.detach_grace_s,
            ),
            flights.is_followed,
        )
        works = {
            "publisher": publisher.run_forever(),
            "lease": registry.live_forever(),
            "credit leases": leases.live_forever(),
            "prices": tariff.keep_forever(),
            "cancels": registry.listen_forever(),
            "models file": reload_forever(router, models_file, providers.names_in),
            "interrupted answers": tell_interrupted(logs, outbox.interrupted),
            "late turns": late_turns.send_forever(),
            "spool gauges": spool_gauges.tell_forever(outbox),
        }
        with contextlib.suppress(Unavailable):  # whoever hears of an answer of ours must not take us for dead: before there is any
            await logs.renew(replica)
        for name, work in works.items():
            stack.push_async_callback(ended, asyncio.create_task(work, name=name))

        sender = asyncio.create_task(outbox.drain_forever(ledger.recording), name="spool sender")
        stack.push_async_callback(ended, sender)

        server = Server(passport_identity(passport), reflect=settings.environment == "development", tls=tls)
        handlers = OrchestratorRpc(
            registry,
            router,
            books,
            clock,
            tools,
            shelf,
            exact,
            lambda: spool_gauges.figures_of(outbox),
            output_tokens_default=settings.output_tokens_default,
            heartbeat_s=settings.heartbeat_s,
        )
        offer(server, handlers)

        def stopping() -> None:
            """Readers of answers that take too long hear that they are interrupted while they are still connected."""
            left_s = (settings.drain_notice_ms + settings.drain_grace_ms * STREAMS_SHARE) / 1000
            asyncio.get_running_loop().call_later(left_s, registry.interrupt_all)

        async def drain(timeout_s: float) -> int:
            """Answers first, then what they left to do, then what the ledger has not booked; that much stays on disk."""
            loop = asyncio.get_running_loop()
            ends_at = loop.time() + timeout_s
            await shadows.stop()
            if stopped := await registry.drain(timeout_s / 2):
                log.warning("answers_interrupted", answers=stopped)
            abandoned = await after.drain(max(0.5, ends_at - loop.time() - 0.5))
            await publisher.flushed(max(0.5, ends_at - loop.time()))
            await outbox.flush(max(0.5, ends_at - loop.time()))
            await leases.give_back(max(LEASES_RETURN_S, ends_at - loop.time()))
            return abandoned

        async def redis_answers() -> None:
            await cache.ping()

        yield Service(
            server=server,
            port=settings.port,
            probes={
                "ledger": lambda: ping(ledger_channel, "ledger"),
                "retrieval": lambda: ping(retrieval_channel, "retrieval"),
                "redis": redis_answers,
                "spool": outbox.probe,
            },
            drain=drain,
            stopping=stopping,
        )


def open_tools(
    settings: OrchestratorSettings, stack: contextlib.AsyncExitStack, search: DocumentSearch, cache: redis.Redis, clock: Clock
) -> Toolset:
    """Every tool of this process; no server is asked yet. Raises ValueError, OSError for a file of servers that cannot be used."""
    built_in: list[Tool] = [SearchDocuments(search), Calculator(), CurrentTime(clock)]
    if hosts := parse_hosts(settings.fetch_hosts):
        from services.orchestrator.tools.fetch_url import FetchUrl

        built_in.append(FetchUrl(hosts))
    confirmed = [name for part in settings.tools_confirmed.split(",") if (name := part.strip())]
    sources: list[Source] = []
    if settings.mcp_servers is not None:
        from services.orchestrator.tools.mcp_servers import open_servers

        for source in open_servers(settings.mcp_servers, environment(), time.monotonic):
            stack.push_async_callback(source.aclose)
            sources.append(source)
            confirmed += source.confirmed
    known = {FETCH_URL, *(tool.spec.name for tool in built_in), *(source.name for source in sources)}
    if unknown := [name for name in confirmed if name.partition("__")[0] not in known]:  # a slip of the pen would leave a tool unguarded
        raise ValueError(f"TAILRACE_TOOLS_CONFIRMED names tools that cannot be: {', '.join(unknown)}")
    pending = RedisPendingCalls(
        cache, kept_s=settings.tools_pending_s, bytes_max=settings.tools_pending_bytes_max, timeout_s=settings.logs_timeout_s
    )
    limits = ToolLimits(
        rounds_max=settings.tools_rounds_max,
        cost_nanousd_max=settings.tools_cost_nanousd_max,
        call_s=settings.tools_call_s,
        confirm_s=settings.tools_confirm_s,
        result_bytes_max=settings.tools_result_bytes_max,
        results_bytes_max=settings.tools_results_bytes_max,
    )
    return Toolset(Toolbox(built_in, sources, confirmed), pending, Confirmations(RedisWords(cache, settings.logs_timeout_s)), limits)


def errand_candidates(router: Router, tier: str) -> tuple[Candidate, ...]:
    """Who may do small calls: the models of the tier. Nobody, if there is no such tier or no provider of it is configured."""
    if not tier:
        return ()
    try:
        candidates = router.route(Wish(tier=tier)).candidates
    except (ModelUnknown, NotAllowed):
        return ()
    return tuple(candidate for candidate in candidates if candidate.provider != EXTRACTIVE)


async def tell_interrupted(logs: SharedLogs, left: Sequence[tuple[str, str]]) -> None:
    """End the logs of what a former process was making, so that nobody waits until its lease has run out."""
    for answer_id, replica in left:
        try:
            await logs.interrupt(answer_id, replica, interrupted(answer_id))
        except DomainError as error:
            log.warning("interruption_not_told", answer_id=answer_id, reason=error.reason)
    if left:
        log.warning("answers_were_interrupted", answers=len(left))
