"""The ledger's values as messages and back. Checks what comes in; decides nothing."""

import math
import re
from datetime import datetime

from services.chassis.errors import RequestInvalid
from services.chassis.money import Price
from services.chassis.wire import price_message, price_value, timestamp, usage_message
from services.ledger.domain import (
    NO_LIMITS,
    ApiKey,
    Attempt,
    Budget,
    CacheFacts,
    Citation,
    Limits,
    Member,
    Operation,
    Plan,
    Session,
    Step,
    Summary,
    Turn,
    UsageRow,
)
from services.ledger.prices import ListedPrice
from services.ledger.rpc import checks
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb

QUESTION_CHARACTERS_MAX = 32 * 1024
ANSWER_CHARACTERS_MAX = 1_000_000
SUMMARY_CHARACTERS_MAX = 16_000
CITATIONS_MAX = 200
ATTEMPTS_MAX = 100
STEPS_MAX = 200
FACTS_MAX = 16
PRICE_MAX = 10**13
"""10,000 USD per million tokens: dearer than anything, and far from what would overflow a sum."""

STATUSES = ("done", "failed", "cancelled")
STEP_STATUSES = ("done", "skipped", "failed")
PURPOSES = ("", "embed", "rewrite", "shadow", "summary", "title")
VERDICTS = ("", "miss", "exact", "semantic", "coalesced", "off")
PLAN_NAME = re.compile(r"[a-z0-9_-]{1,64}")
CACHE_SCOPES = ("", "tenant", "user", "off")
PLAN_TOOL = re.compile(r"\*|[A-Za-z0-9_-]{1,64}|[A-Za-z0-9-]{1,64}__\*")
TRACE_ID = re.compile(r"([0-9a-f]{32})?")


def plan_message(plan: Plan) -> pb.Plan:
    return pb.Plan(
        name=plan.name,
        requests_per_minute=plan.requests_per_minute,
        tokens_per_minute=plan.tokens_per_minute,
        concurrent_answers=plan.concurrent_answers,
        monthly_budget_nanousd=plan.monthly_budget_nanousd,
        tiers=plan.tiers,
        tenant_limits=_limits_message(plan.tenant_limits),
        key_limits=_limits_message(plan.key_limits),
        answer_deadline_ms=plan.answer_deadline_ms,
        tools=plan.tools,
        cache_scope=plan.cache_scope,
    )


def _limits_message(limits: Limits) -> pb.Limits | None:
    if limits == NO_LIMITS:
        return None
    return pb.Limits(
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        concurrent_answers=limits.concurrent_answers,
    )


def plan_value(message: pb.Plan) -> Plan:
    checks.between(len(message.tiers), "plan.tiers", 1, 32)
    checks.between(len(message.tools), "plan.tools", 0, 64)
    return Plan(
        checks.matching(message.name, "plan.name", PLAN_NAME, "1-64 of [a-z0-9_-]"),
        checks.between(message.requests_per_minute, "plan.requests_per_minute", 1, 1_000_000),
        checks.between(message.tokens_per_minute, "plan.tokens_per_minute", 1, 1_000_000_000),
        checks.between(message.concurrent_answers, "plan.concurrent_answers", 1, 10_000),
        checks.between(message.monthly_budget_nanousd, "plan.monthly_budget_nanousd", 0, checks.MONEY_MAX),
        tuple(dict.fromkeys(checks.text(tier, "plan.tiers", 64, empty=False) for tier in message.tiers)),
        _limits_value(message.tenant_limits, "plan.tenant_limits"),
        _limits_value(message.key_limits, "plan.key_limits"),
        checks.between(message.answer_deadline_ms, "plan.answer_deadline_ms", 0, 3_000_000),
        tuple(dict.fromkeys(checks.matching(tool, "plan.tools", PLAN_TOOL, "a name, `server__*` or `*`") for tool in message.tools)),
        checks.one_of(message.cache_scope, "plan.cache_scope", CACHE_SCOPES),
    )


def _limits_value(message: pb.Limits, field: str) -> Limits:
    return Limits(
        checks.between(message.requests_per_minute, f"{field}.requests_per_minute", 0, 10_000_000),
        checks.between(message.tokens_per_minute, f"{field}.tokens_per_minute", 0, 100_000_000_000),
        checks.between(message.concurrent_answers, f"{field}.concurrent_answers", 0, 100_000),
    )


def user_message(member: Member) -> pb.User:
    return pb.User(user=member.user, plan=member.plan.name, created_at=timestamp(member.created_at), display_name=member.display_name)


def subscription_message(member: Member) -> pb.Subscription:
    started_at = member.subscribed_at or member.created_at
    return pb.Subscription(
        user=member.user,
        plan=member.plan.name,
        started_at=timestamp(started_at),
        next_plan=member.next_plan,
        changes_at=timestamp(member.changes_at) if member.changes_at is not None else None,
    )


def past_subscription_message(user: str, plan: str, started_at: datetime, ended_at: datetime | None) -> pb.PastSubscription:
    return pb.PastSubscription(
        subscription=pb.Subscription(user=user, plan=plan, started_at=timestamp(started_at)),
        ended_at=timestamp(ended_at) if ended_at else None,
    )


def budget_message(budget: Budget) -> pb.Budget:
    return pb.Budget(
        scope=budget.scope,
        subject=budget.subject,
        period=budget.period,
        limit_nanousd=budget.limit_nanousd,
        spent_nanousd=budget.spent_nanousd,
        held_nanousd=budget.held_nanousd,
        resets_at=timestamp(budget.resets_at),
    )


def key_message(key: ApiKey) -> pb.ApiKey:
    return pb.ApiKey(
        key_id=key.key_id,
        name=key.name,
        user=key.user,
        roles=key.roles,
        scopes=key.scopes,
        created_at=timestamp(key.created_at),
        expires_at=timestamp(key.expires_at) if key.expires_at else None,
        revoked=key.revoked,
    )


def listed_price_message(listed: ListedPrice) -> common_pb2.Price:
    return price_message(listed.price, listed.valid_from)


def price_and_day(message: common_pb2.Price) -> tuple[Price, datetime | None]:
    """A price that an admin gives, and from when, if that was said."""
    checks.text(message.provider, "price.provider", 64, empty=False)
    checks.text(message.model, "price.model", 128, empty=False)
    checks.text(message.source, "price.source", 512)
    for name in ("input_nanousd_per_mtok", "output_nanousd_per_mtok"):
        if not message.HasField(name):  # an unset figure would make tokens free
            raise RequestInvalid(f"{name} is not set; a price of nothing is an explicit 0", field=f"price.{name}", bound=f"0-{PRICE_MAX}")
    message = _whole(message)
    for name in (
        "input_nanousd_per_mtok",
        "output_nanousd_per_mtok",
        "cache_read_nanousd_per_mtok",
        "cache_write_5m_nanousd_per_mtok",
        "cache_write_1h_nanousd_per_mtok",
        "long_input_nanousd_per_mtok",
        "long_output_nanousd_per_mtok",
    ):
        checks.between(getattr(message, name), f"price.{name}", 0, PRICE_MAX)
    checks.between(message.long_context_above_tokens, "price.long_context_above_tokens", 0, checks.TOKENS_MAX)
    if message.long_context_above_tokens:
        for name in ("input", "output"):
            usual, long = getattr(message, f"{name}_nanousd_per_mtok"), getattr(message, f"long_{name}_nanousd_per_mtok")
            if long < usual:  # an unset figure would make long prompts free
                bound = f">= {name}_nanousd_per_mtok"
                raise RequestInvalid(f"the long-context price must be {bound}", field=f"price.long_{name}_nanousd_per_mtok", bound=bound)
    price = price_value(message)
    if price.worst_case_nanousd(3 * checks.TOKENS_MAX, checks.TOKENS_MAX) > checks.MONEY_MAX:  # three kinds of prompt tokens
        bound = "a whole call costs at most 10^18 nano-USD"
        raise RequestInvalid(
            "cached tokens of a long prompt would cost too much beside plain ones", field="price.long_input_nanousd_per_mtok", bound=bound
        )
    return price, checks.moment(message.valid_from, "price.valid_from") if message.HasField("valid_from") else None


def _whole(message: common_pb2.Price) -> common_pb2.Price:
    """The price with what it says nothing of: tokens read from or written to a cache cost as others of the prompt do."""
    whole = common_pb2.Price()
    whole.CopyFrom(message)
    for name in ("cache_read_nanousd_per_mtok", "cache_write_5m_nanousd_per_mtok", "cache_write_1h_nanousd_per_mtok"):
        if not message.HasField(name):
            setattr(whole, name, message.input_nanousd_per_mtok)
    return whole


def session_message(session: Session) -> pb.Session:
    return pb.Session(
        session_id=session.session_id,
        title=session.title,
        created_at=timestamp(session.created_at),
        updated_at=timestamp(session.updated_at),
        turns=session.turns,
        head_answer_id=session.head,
        title_by=session.title_by,
    )


def turn_message(turn: Turn) -> pb.Turn:
    return pb.Turn(
        answer_id=turn.answer_id,
        question=turn.question,
        text=turn.text,
        citations=[_citation_message(citation) for citation in turn.citations],
        created_at=timestamp(turn.created_at),
        complete=turn.complete,
        parent_answer_id=turn.parent,
    )


def summary_message(summary: Summary) -> pb.Summary:
    return pb.Summary(
        through_answer_id=summary.through, text=summary.text, made_by=summary.made_by, created_at=timestamp(summary.created_at)
    )


def summary_value(message: pb.Summary, now: datetime) -> Summary:
    """A summary to keep, made now."""
    text = checks.prose(message.text, "summary.text", SUMMARY_CHARACTERS_MAX)
    if not text.strip():
        raise RequestInvalid("a summary says something", field="summary.text", bound=f"1-{SUMMARY_CHARACTERS_MAX} characters")
    through = str(checks.uuid(message.through_answer_id, "summary.through_answer_id"))
    return Summary(through, text, checks.text(message.made_by, "summary.made_by", 128, empty=False), now)


def turn_value(message: pb.Turn, now: datetime) -> Turn:
    """A turn to keep; without a time, it is of now."""
    checks.between(len(message.citations), "turn.citations", 0, CITATIONS_MAX)
    return Turn(
        str(checks.uuid(message.answer_id, "turn.answer_id")),
        checks.prose(message.question, "turn.question", QUESTION_CHARACTERS_MAX),
        checks.prose(message.text, "turn.text", ANSWER_CHARACTERS_MAX),
        tuple(_citation_value(citation) for citation in message.citations),
        checks.moment(message.created_at, "turn.created_at") if message.HasField("created_at") else now,
        message.complete,
    )


def _citation_message(citation: Citation) -> common_pb2.CitedPassage:
    return common_pb2.CitedPassage(
        number=citation.number,
        document_id=citation.document_id,
        chunk_id=citation.chunk_id,
        title=citation.title,
        source_uri=citation.source_uri,
        text=citation.text,
        start=citation.start,
        end=citation.end,
        score=citation.score,
        heading_path=citation.heading_path,
        document_version=citation.document_version,
        page=citation.page,
        flags=citation.flags,
    )


def _citation_value(message: common_pb2.CitedPassage) -> Citation:
    field = "turn.citations"
    return Citation(
        number=checks.between(message.number, f"{field}.number", 1, 10_000),
        document_id=checks.text(message.document_id, f"{field}.document_id", 256),
        chunk_id=checks.text(message.chunk_id, f"{field}.chunk_id", 256),
        title=checks.prose(message.title, f"{field}.title", 4096),
        source_uri=checks.prose(message.source_uri, f"{field}.source_uri", 4096),
        text=checks.prose(message.text, f"{field}.text", 100_000),
        start=message.start,
        end=message.end,
        score=message.score if math.isfinite(message.score) else 0.0,
        heading_path=tuple(checks.prose(heading, f"{field}.heading_path", 4096) for heading in message.heading_path),
        document_version=message.document_version,
        page=checks.between(message.page, f"{field}.page", 0, 2**31 - 1),
        flags=tuple(checks.text(flag, f"{field}.flags", 64) for flag in message.flags[:16]),
    )


def usage_row_message(row: UsageRow) -> pb.QueryUsageResponse:
    return pb.QueryUsageResponse(
        group=row.group,
        operations=row.operations,
        failed=row.failed,
        cancelled=row.cancelled,
        estimated=row.estimated,
        cache_hits=row.cache_hits,
        coalesced=row.coalesced,
        attempts=row.attempts,
        usage=usage_message(row.usage),
        cost_nanousd=row.cost_nanousd,
        saved_nanousd=row.cache_saved_nanousd,
        prompt_cache_saved_nanousd=row.prompt_cache_saved_nanousd,
        tiering_saved_nanousd=row.tiering_saved_nanousd,
        duration_ms_p50=row.duration_ms_p50,
        duration_ms_p90=row.duration_ms_p90,
        duration_ms_p99=row.duration_ms_p99,
        first_token_ms_p50=row.first_token_ms_p50,
        first_token_ms_p90=row.first_token_ms_p90,
        first_token_ms_p99=row.first_token_ms_p99,
    )


def operation_message(operation: Operation, source_question: str | None = None) -> pb.Operation:
    cache = operation.cache
    return pb.Operation(
        operation_id=operation.operation_id,
        tenant=operation.tenant,
        user=operation.user,
        session_id=operation.session_id,
        trace_id=operation.trace_id,
        status=operation.status,
        tier=operation.tier,
        model=operation.model,
        provider=operation.provider,
        finish_reason=operation.finish_reason,
        error_reason=operation.error_reason,
        usage=usage_message(operation.usage),
        cost_nanousd=operation.cost_nanousd,
        cache=common_pb2.CacheReceipt(
            verdict=cache.verdict,
            similarity=cache.similarity,
            source_question=source_question,
            source_answer_id=cache.source_answer_id,
            age_s=cache.age_s,
            saved_nanousd=cache.saved_nanousd,
            reason=cache.reason,
        ),
        estimated=operation.estimated,
        created_at=timestamp(operation.created_at),
        first_token_ms=operation.first_token_ms,
        duration_ms=operation.duration_ms,
        steps=[
            common_pb2.StepTiming(
                name=step.name, status=step.status, started_ms=step.started_ms, duration_ms=step.duration_ms, facts=step.facts
            )
            for step in operation.steps
        ],
        attempts=[_attempt_message(attempt) for attempt in operation.attempts],
        collection=operation.collection,
        api_key_id=operation.api_key_id,
        purpose=operation.purpose,
    )


def _attempt_message(attempt: Attempt) -> pb.Attempt:
    return pb.Attempt(
        attempt=attempt.attempt,
        hold_id=attempt.hold_id,
        provider=attempt.provider,
        model=attempt.model,
        provider_request_id=attempt.provider_request_id,
        usage=usage_message(attempt.usage),
        cost_nanousd=attempt.cost_nanousd,
        finish_reason=attempt.finish_reason,
        error_reason=attempt.error_reason,
        first_token_ms=attempt.first_token_ms,
        duration_ms=attempt.duration_ms,
        estimated=attempt.estimated,
        price_version=attempt.price_version,
        not_sent=attempt.not_sent,
    )


def operation_value(message: pb.Operation) -> Operation:
    """A record as it was sent. Usage and cost of the whole are not read: the ledger sums them itself."""
    checks.between(len(message.attempts), "operation.attempts", 0, ATTEMPTS_MAX)
    checks.between(len(message.steps), "operation.steps", 0, STEPS_MAX)
    attempts = tuple(_attempt_value(attempt) for attempt in message.attempts)
    if len({attempt.attempt for attempt in attempts}) < len(attempts):
        raise RequestInvalid("two attempts have the same number", field="operation.attempts.attempt")
    if not message.HasField("created_at"):
        raise RequestInvalid("an operation needs the time it was accepted", field="operation.created_at")
    return Operation(
        operation_id=str(checks.uuid(message.operation_id, "operation.operation_id")),
        tenant=checks.text(message.tenant, "operation.tenant", 128, empty=False),
        user=checks.text(message.user, "operation.user", 256, empty=False),
        status=checks.one_of(message.status, "operation.status", STATUSES),
        created_at=checks.moment(message.created_at, "operation.created_at"),
        cache=_cache_value(message.cache),
        session_id=checks.text(message.session_id, "operation.session_id", 128),
        api_key_id=checks.text(message.api_key_id, "operation.api_key_id", 64),
        trace_id=checks.matching(message.trace_id, "operation.trace_id", TRACE_ID, "32 hex digits"),
        tier=checks.text(message.tier, "operation.tier", 128),
        model=checks.text(message.model, "operation.model", 128),
        provider=checks.text(message.provider, "operation.provider", 64),
        collection=checks.text(message.collection, "operation.collection", 128),
        finish_reason=checks.text(message.finish_reason, "operation.finish_reason", 64),
        error_reason=checks.text(message.error_reason, "operation.error_reason", 64),
        estimated=message.estimated,
        first_token_ms=checks.milliseconds(message.first_token_ms, "operation.first_token_ms"),
        duration_ms=checks.milliseconds(message.duration_ms, "operation.duration_ms"),
        steps=tuple(_step_value(step) for step in message.steps),
        attempts=attempts,
        purpose=checks.one_of(message.purpose, "operation.purpose", PURPOSES),
    )


def _attempt_value(message: pb.Attempt) -> Attempt:
    field = "operation.attempts"
    return Attempt(
        attempt=checks.between(message.attempt, f"{field}.attempt", 1, ATTEMPTS_MAX),
        hold_id=str(checks.uuid(message.hold_id, f"{field}.hold_id")) if message.hold_id else "",
        provider=checks.text(message.provider, f"{field}.provider", 64),
        model=checks.text(message.model, f"{field}.model", 128),
        usage=checks.usage(message.usage, f"{field}.usage"),
        provider_request_id=checks.text(message.provider_request_id, f"{field}.provider_request_id", 256),
        finish_reason=checks.text(message.finish_reason, f"{field}.finish_reason", 64),
        error_reason=checks.text(message.error_reason, f"{field}.error_reason", 64),
        first_token_ms=checks.milliseconds(message.first_token_ms, f"{field}.first_token_ms"),
        duration_ms=checks.milliseconds(message.duration_ms, f"{field}.duration_ms"),
        estimated=message.estimated,
        price_version=checks.between(message.price_version, f"{field}.price_version", 0, 2**31 - 1),
        not_sent=message.not_sent,
        lease_id=str(checks.uuid(message.lease_id, f"{field}.lease_id")) if message.lease_id else "",
        drawn_nanousd=checks.between(message.drawn_nanousd, f"{field}.drawn_nanousd", 0, checks.MONEY_MAX),
    )


def _step_value(message: common_pb2.StepTiming) -> Step:
    field = "operation.steps"
    checks.between(len(message.facts), f"{field}.facts", 0, FACTS_MAX)
    facts = {checks.text(key, f"{field}.facts", 64): checks.text(value, f"{field}.facts", 512) for key, value in message.facts.items()}
    return Step(
        checks.text(message.name, f"{field}.name", 64, empty=False),
        checks.one_of(message.status, f"{field}.status", STEP_STATUSES),
        checks.milliseconds(message.started_ms, f"{field}.started_ms"),
        checks.milliseconds(message.duration_ms, f"{field}.duration_ms"),
        facts,
    )


def _cache_value(message: common_pb2.CacheReceipt) -> CacheFacts:
    """The receipt without its text: an operation keeps none."""
    field = "operation.cache"
    similarity = message.similarity if message.HasField("similarity") else None
    if similarity is not None and not -1.001 <= similarity <= 1.001:  # the comparison is false for NaN too
        raise RequestInvalid(f"{field}.similarity must be -1 to 1", field=f"{field}.similarity", bound="-1 to 1")
    return CacheFacts(
        checks.one_of(message.verdict, f"{field}.verdict", VERDICTS),
        similarity,
        checks.text(message.source_answer_id, f"{field}.source_answer_id", 64) if message.HasField("source_answer_id") else None,
        checks.between(message.age_s, f"{field}.age_s", 0, 10**10) if message.HasField("age_s") else None,
        checks.between(message.saved_nanousd, f"{field}.saved_nanousd", 0, checks.MONEY_MAX),
        checks.text(message.reason, f"{field}.reason", 64),
    )
