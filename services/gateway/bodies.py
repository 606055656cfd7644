"""What clients send as JSON: exact shapes with bounds, and how each becomes a message. Every mistake names its field and its bound.

Nothing is read here that is not in a shape; tenant and user are in none.
"""

import base64
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from google.protobuf.struct_pb2 import Struct, Value

from services.chassis.errors import PayloadTooLarge, RequestInvalid
from services.gateway import usd
from services.gateway.deadlines import DEADLINE_MS_MAX
from services.gateway.limits import HARMLESS_TOOLS
from services.gateway.queries import at
from tailrace.common.v1 import common_pb2 as common
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval

QUESTION_BYTES_MAX = 32_768
DOCUMENT_BYTES_MAX = 20 * 1024 * 1024
SCHEMA_DEPTH_MAX = 24
"""A level of JSON is three nested messages, and protobuf stops at a hundred."""
KEY_LENGTH_MAX = 256
IMAGES_MAX = 8
IMAGE_BYTES_MAX = 5 * 1024 * 1024
IMAGES_BYTES_MAX = 10 * 1024 * 1024
RESULT_BYTES_MAX = 65_536
ANSWER_BYTES_MAX = 20 * 1024 * 1024
"""The body of a question: its pictures in base64, the results of tools, and its words."""

Name = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[A-Za-z0-9_-]*\Z")]
Usd = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?\Z")]
ToolName = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+\Z")]
Tier = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
UserName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
FRAME_ID_LENGTH_MAX = 128
FrameId = Annotated[str, msgspec.Meta(max_length=FRAME_ID_LENGTH_MAX)]
PlanTool = Annotated[str, msgspec.Meta(pattern=r"^(\*|[A-Za-z0-9_-]{1,64}|[A-Za-z0-9-]{1,64}__\*)\Z")]
PlanName = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9_-]+\Z")]
Role = Literal["user", "service", "admin"]
Scope = Literal["answers", "search", "documents:read", "documents:write", "records", "admin"]

B = TypeVar("B", bound="Body")


class Body(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A JSON object with exactly these fields."""


class ToolBody(Body, frozen=True, kw_only=True):
    """A tool as the model sees it."""

    name: ToolName
    description: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    input_schema: dict[str, Any] = {}


class ImageBody(Body, frozen=True, kw_only=True):
    """A picture, in base64."""

    media_type: Literal["image/png", "image/jpeg", "image/gif", "image/webp"]
    data: Annotated[str, msgspec.Meta(max_length=IMAGE_BYTES_MAX * 4 // 3 + 4)]

    def message(self, field: str) -> orchestrator.Image:
        """As the orchestrator takes it, which looks whether it is what it is called. Raises RequestInvalid."""
        try:
            data = base64.b64decode(self.data, validate=True)
        except ValueError:
            raise RequestInvalid("the picture is not base64", field=f"{field}.data", bound="base64 with padding (RFC 4648, 4)") from None
        if not 0 < len(data) <= IMAGE_BYTES_MAX:
            raise RequestInvalid("the picture is empty or too large", field=f"{field}.data", bound=f"1-{IMAGE_BYTES_MAX} bytes")
        return orchestrator.Image(media_type=self.media_type, data=data)


class ToolResultBody(Body, frozen=True, kw_only=True):
    """What a tool of the client returned."""

    call_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    text: Annotated[str, msgspec.Meta(max_length=RESULT_BYTES_MAX)] = ""
    failed: bool = False

    def message(self, field: str) -> orchestrator.ToolResult:
        """As the orchestrator takes it. Raises RequestInvalid."""
        if len(self.text.encode()) > RESULT_BYTES_MAX:
            raise RequestInvalid("the result is too large", field=f"{field}.text", bound=f"at most {RESULT_BYTES_MAX} bytes")
        return orchestrator.ToolResult(call_id=self.call_id, text=self.text, failed=self.failed)


class ToolWordBody(Body, frozen=True, kw_only=True):
    """A person's word on a call that waits for it."""

    allowed: bool


class AnswerBody(Body, frozen=True, kw_only=True):
    """A question."""

    question: str = ""
    session_id: Name = ""
    model: Annotated[str, msgspec.Meta(max_length=128)] = ""
    tier: Annotated[str, msgspec.Meta(max_length=64)] = ""
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=64_000)] | None = None
    collection: Name = ""
    cache: Literal["use", "refresh", "off"] = "use"
    priority: Literal["interactive", "batch"] = "interactive"
    stream: bool = True
    output_schema: dict[str, Any] | None = None
    tools: Annotated[list[ToolBody], msgspec.Meta(max_length=64)] = []
    server_tools: Annotated[list[ToolName], msgspec.Meta(max_length=32)] = []
    images: Annotated[list[ImageBody], msgspec.Meta(max_length=IMAGES_MAX)] = []
    tool_results: Annotated[list[ToolResultBody], msgspec.Meta(max_length=64)] = []
    continues: Annotated[str, msgspec.Meta(max_length=128)] = ""
    replaces: Annotated[str, msgspec.Meta(max_length=128)] = ""
    reasoning: bool = False

    def message(self, idempotency_key: str) -> orchestrator.AnswerRequest:
        """As the orchestrator takes it. Raises RequestInvalid."""
        if self.question or not self.continues:  # what goes on need not be asked again
            _require_text(self.question, "question")
        request = orchestrator.AnswerRequest(
            question=self.question,
            session_id=self.session_id,
            model=self.model,
            tier=self.tier,
            max_output_tokens=self.max_output_tokens,
            collection=self.collection,
            cache=_CACHE_MODES[self.cache],
            priority=_PRIORITIES[self.priority],
            idempotency_key=idempotency_key,
            cancel_on_disconnect=not self.stream,
            whole=not self.stream,
            server_tools=self.server_tools,
            images=[image.message(f"images[{number}]") for number, image in enumerate(self.images)],
            tool_results=[result.message(f"tool_results[{number}]") for number, result in enumerate(self.tool_results)],
            continues=self.continues,
            replaces=self.replaces,
            reasoning=self.reasoning,
        )
        if sum(len(image.data) for image in request.images) > IMAGES_BYTES_MAX:
            raise RequestInvalid("the pictures are too large together", field="images", bound=f"at most {IMAGES_BYTES_MAX} bytes")
        if self.output_schema is not None:
            request.output_schema.CopyFrom(_struct(self.output_schema, "output_schema"))
        for number, tool in enumerate(self.tools):
            schema = _struct(tool.input_schema, f"tools[{number}].input_schema")
            request.tools.add(name=tool.name, description=tool.description, input_schema=schema)
        return request


class SessionPatchBody(Body, frozen=True, kw_only=True):
    """What shall be different about a conversation."""

    title: Annotated[str, msgspec.Meta(min_length=1, max_length=120)] | None = None
    head_answer_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None

    def message(self, session_id: str) -> ledger.UpdateSessionRequest:
        """As the ledger takes it. Raises RequestInvalid."""
        if self.title is None and self.head_answer_id is None:
            raise RequestInvalid("nothing shall be changed", field="title", bound="title or head_answer_id")
        if self.title is not None:
            _require_text(self.title, "title")
        return ledger.UpdateSessionRequest(session_id=session_id, title=self.title, head_answer_id=self.head_answer_id or "")


class AskFrame(AnswerBody, frozen=True, kw_only=True, tag_field="type", tag="ask"):
    """A question over a WebSocket. Its answer is always streamed."""

    request_id: FrameId = ""
    deadline_ms: Annotated[int, msgspec.Meta(ge=1, le=DEADLINE_MS_MAX)] | None = None
    idempotency_key: Annotated[str, msgspec.Meta(max_length=KEY_LENGTH_MAX, pattern=r"^[ -~]*\Z")] = ""


class ResumeFrame(Body, frozen=True, kw_only=True, tag_field="type", tag="resume"):
    """Send what came after an event."""

    answer_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    after: Annotated[int, msgspec.Meta(ge=0, le=10**18 - 1)] = 0
    request_id: FrameId = ""


class CancelFrame(Body, frozen=True, kw_only=True, tag_field="type", tag="cancel"):
    """Stop an answer."""

    answer_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    request_id: FrameId = ""


class ConfirmFrame(ToolWordBody, frozen=True, kw_only=True, tag_field="type", tag="confirm"):
    """A person's word on a call that waits for it."""

    answer_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    call_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    request_id: FrameId = ""


class PingFrame(Body, frozen=True, kw_only=True, tag_field="type", tag="ping"):
    """Are you there? For clients that cannot send a WebSocket's own ping, such as browsers."""

    request_id: FrameId = ""


Frame = AskFrame | ResumeFrame | CancelFrame | ConfirmFrame | PingFrame


class AccessBody(Body, frozen=True, kw_only=True):
    """Who may read a document, besides its uploader, admins and services. Empty = everybody in the tenant."""

    users: Annotated[list[Annotated[str, msgspec.Meta(min_length=1, max_length=256)]], msgspec.Meta(max_length=64)] = []
    groups: Annotated[list[Annotated[str, msgspec.Meta(min_length=1, max_length=128)]], msgspec.Meta(max_length=64)] = []


class FactsBody(Body, frozen=True, kw_only=True):
    """What is said of a document besides its content; in a form, of the files that follow."""

    metadata: Annotated[
        dict[Annotated[str, msgspec.Meta(max_length=256)], Annotated[str, msgspec.Meta(max_length=256)] | float | bool],
        msgspec.Meta(max_length=32),
    ] = {}
    access: AccessBody | None = None

    def tell(self, header: retrieval.DocumentHeader) -> None:
        """Write it into `header`."""
        if self.access is not None:
            header.access.CopyFrom(retrieval.Access(users=self.access.users, groups=self.access.groups))
        for key, fact in self.metadata.items():
            _set_fact(header.metadata[key], fact)


class DocumentBody(FactsBody, frozen=True, kw_only=True):
    """A document as text."""

    text: str
    title: Annotated[str, msgspec.Meta(max_length=512)] = ""
    source_uri: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    collection: Name = ""

    def header(self) -> retrieval.DocumentHeader:
        """As retrieval takes it."""
        if not self.title.strip() and not self.source_uri.strip():
            raise RequestInvalid("a document needs a title or a source_uri", field="title", bound="1-512 characters")
        for field, value in (("title", self.title), ("source_uri", self.source_uri)):
            if "\0" in value:
                raise RequestInvalid(f"{field} contains a NUL character", field=field, bound="no NUL")
        header = retrieval.DocumentHeader(title=self.title, source_uri=self.source_uri, collection=self.collection)
        self.tell(header)
        return header

    def content(self) -> bytes:
        """Its text as UTF-8. Raises PayloadTooLarge, RequestInvalid."""
        content = self.text.encode()
        if not content.strip():
            raise RequestInvalid("the text is empty", field="text", bound="1 byte to 20 MiB")
        if len(content) > DOCUMENT_BYTES_MAX:
            raise PayloadTooLarge(f"a document has at most {DOCUMENT_BYTES_MAX} bytes", field="text", bound_bytes=DOCUMENT_BYTES_MAX)
        return content


class JobPartBody(Body, frozen=True, kw_only=True):
    """One document of a job; without `index`, all of it."""

    index: Annotated[int, msgspec.Meta(ge=0, lt=10_000)] | None = None


class ConditionBody(Body, frozen=True, kw_only=True):
    """What one field of a document's metadata must be like."""

    key: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    any_of: Annotated[list[Annotated[str, msgspec.Meta(max_length=256)] | float | bool], msgspec.Meta(max_length=64)] = []
    at_least: float | None = None
    below: float | None = None
    since: str = msgspec.field(name="from", default="")
    until: str = ""
    negated: bool = False

    def message(self, field: str) -> retrieval.MetadataCondition:
        """As retrieval takes it; `field` says which condition it is. Raises RequestInvalid."""
        condition = retrieval.MetadataCondition(key=self.key, at_least=self.at_least, below=self.below, negated=self.negated)
        for fact in self.any_of:
            _set_fact(condition.any_of.add(), fact)
        if self.since:
            getattr(condition, "from").FromDatetime(at(self.since, f"{field}.from"))
        if self.until:
            condition.until.FromDatetime(at(self.until, f"{field}.until"))
        return condition


class SearchBody(Body, frozen=True, kw_only=True):
    """A search."""

    query: str
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 10
    mode: Literal["hybrid", "dense", "sparse"] = "hybrid"
    collection: Name = ""
    more_collections: Annotated[list[Name], msgspec.Meta(max_length=15)] = []
    document_ids: Annotated[list[Annotated[str, msgspec.Meta(min_length=1, max_length=128)]], msgspec.Meta(max_length=100)] = []
    metadata: Annotated[list[ConditionBody], msgspec.Meta(max_length=16)] = []
    neighbours: Annotated[int, msgspec.Meta(ge=0, le=5)] = 0
    explain: bool = False

    def message(self) -> retrieval.SearchRequest:
        """As retrieval takes it. Raises RequestInvalid."""
        _require_text(self.query, "query")
        return retrieval.SearchRequest(
            query=self.query,
            limit=self.limit,
            mode=_SEARCH_MODES[self.mode],
            collection=self.collection,
            more_collections=self.more_collections,
            document_ids=self.document_ids,
            metadata=[condition.message(f"metadata[{place}]") for place, condition in enumerate(self.metadata)],
            neighbours=self.neighbours,
            explain=self.explain,
        )


class LimitsBody(Body, frozen=True, kw_only=True):
    """What a tenant as a whole, or each API key, may use; 0 = no limit of that kind."""

    requests_per_minute: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0
    tokens_per_minute: Annotated[int, msgspec.Meta(ge=0, le=100_000_000_000)] = 0
    concurrent_answers: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0

    def message(self) -> ledger.Limits:
        return ledger.Limits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            concurrent_answers=self.concurrent_answers,
        )


class PlanBody(Body, frozen=True, kw_only=True):
    """A plan."""

    requests_per_minute: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    tokens_per_minute: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
    concurrent_answers: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    monthly_budget_usd: Usd = "0"
    tiers: Annotated[list[Tier], msgspec.Meta(min_length=1, max_length=32)]
    tenant_limits: LimitsBody = LimitsBody()
    key_limits: LimitsBody = LimitsBody()
    answer_deadline_ms: Annotated[int, msgspec.Meta(ge=0, le=DEADLINE_MS_MAX)] = 0
    tools: Annotated[list[PlanTool], msgspec.Meta(max_length=64)] = msgspec.field(default_factory=lambda: list(HARMLESS_TOOLS))
    cache_scope: Literal["", "tenant", "user", "off"] = ""

    def message(self, name: str) -> ledger.PutPlanRequest:
        plan = ledger.Plan(
            name=name,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            concurrent_answers=self.concurrent_answers,
            monthly_budget_nanousd=usd.parse(self.monthly_budget_usd),
            tiers=self.tiers,
            tenant_limits=self.tenant_limits.message(),
            key_limits=self.key_limits.message(),
            answer_deadline_ms=self.answer_deadline_ms,
            tools=self.tools,
            cache_scope=self.cache_scope,
        )
        return ledger.PutPlanRequest(plan=plan)


class NamedPlanBody(PlanBody, frozen=True, kw_only=True):
    """A plan that says its own name."""

    name: PlanName


class SubscriptionBody(Body, frozen=True, kw_only=True):
    """Which plan a user is on, from when."""

    plan: PlanName
    when: Literal["now", "period_end"] = "now"


class BudgetBody(Body, frozen=True, kw_only=True):
    """How much may be spent in a period."""

    period: Literal["day", "month"]
    limit_usd: Usd


class PriceBody(Body, frozen=True, kw_only=True):
    """A new version of a model's price, in US dollars per million tokens. Cached tokens cost what others of the prompt do unless it says
    otherwise: what is not known is never free."""

    provider: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    model: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    input_usd_per_mtok: Usd
    output_usd_per_mtok: Usd
    cache_read_usd_per_mtok: Usd = ""
    cache_write_5m_usd_per_mtok: Usd = ""
    cache_write_1h_usd_per_mtok: Usd = ""
    long_context_above_tokens: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] = 0
    long_input_usd_per_mtok: Usd = "0"
    long_output_usd_per_mtok: Usd = "0"
    source: Annotated[str, msgspec.Meta(max_length=256)] = ""
    valid_from: str = ""
    """Empty = from now on."""

    def message(self) -> ledger.PutPriceRequest:
        price = common.Price(
            provider=self.provider,
            model=self.model,
            input_nanousd_per_mtok=usd.parse(self.input_usd_per_mtok),
            output_nanousd_per_mtok=usd.parse(self.output_usd_per_mtok),
            cache_read_nanousd_per_mtok=usd.parse(self.cache_read_usd_per_mtok or self.input_usd_per_mtok),
            cache_write_5m_nanousd_per_mtok=usd.parse(self.cache_write_5m_usd_per_mtok or self.input_usd_per_mtok),
            cache_write_1h_nanousd_per_mtok=usd.parse(self.cache_write_1h_usd_per_mtok or self.input_usd_per_mtok),
            long_context_above_tokens=self.long_context_above_tokens,
            long_input_nanousd_per_mtok=usd.parse(self.long_input_usd_per_mtok),
            long_output_nanousd_per_mtok=usd.parse(self.long_output_usd_per_mtok),
            source=self.source,
        )
        if self.valid_from:
            price.valid_from.FromDatetime(at(self.valid_from, "valid_from"))
        return ledger.PutPriceRequest(price=price)


class ApiKeyBody(Body, frozen=True, kw_only=True):
    """A key to be made."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    user: UserName
    roles: Annotated[list[Role], msgspec.Meta(max_length=3)] = []
    scopes: Annotated[list[Scope], msgspec.Meta(max_length=16)] = []
    expires_at: str = ""


class SessionBody(Body, frozen=True, kw_only=True):
    """What a browser signs in with."""

    token: Annotated[str, msgspec.Meta(min_length=1, max_length=8192, pattern=r"^[\x21-\x7e]+\Z")]


class RevocationBody(Body, frozen=True, kw_only=True):
    """A token by its `jti`, or a user: one of the two."""

    jti: Annotated[str, msgspec.Meta(max_length=256)] = ""
    expires_at: str = ""
    user: Annotated[str, msgspec.Meta(max_length=256)] = ""


class UserBody(Body, frozen=True, kw_only=True):
    """What is kept of a user."""

    display_name: Annotated[str, msgspec.Meta(max_length=256)] = ""


class NamedUserBody(UserBody, frozen=True, kw_only=True):
    """A user that says its own name."""

    user: UserName


_CACHE_MODES = {
    "use": orchestrator.CACHE_MODE_USE,
    "refresh": orchestrator.CACHE_MODE_REFRESH,
    "off": orchestrator.CACHE_MODE_OFF,
}
_PRIORITIES = {
    "interactive": orchestrator.PRIORITY_INTERACTIVE,
    "batch": orchestrator.PRIORITY_BATCH,
}
_SEARCH_MODES = {
    "hybrid": retrieval.SEARCH_MODE_HYBRID,
    "dense": retrieval.SEARCH_MODE_DENSE,
    "sparse": retrieval.SEARCH_MODE_SPARSE,
}
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_NAMED = re.compile(r"field `(?P<name>[^`]*)`")


def parse(body: bytes, shape: type[B], *, within: str = "") -> B:
    """Read `body` as `shape`. `within` is put before the names of fields, to say which of many objects it was. Raises RequestInvalid."""
    if not body.strip():
        raise RequestInvalid("the body is empty", field=within or "body", bound="a JSON object")
    try:
        value = msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as error:
        raise _mistake(str(error), within) from None
    except UnicodeDecodeError:
        raise RequestInvalid("the body is not UTF-8", field=within or "body", bound="UTF-8") from None
    except RecursionError:
        raise RequestInvalid("the JSON is nested too deep", field=within or "body", bound="less nesting") from None
    except msgspec.DecodeError as error:
        raise RequestInvalid(f"the body is not JSON: {str(error)[:120]}", field=within or "body", bound="a JSON object") from None
    _refuse_nul(value, within)
    return value


def collection(name: str) -> str:
    """`name` as the name of a collection that did not come in JSON; empty = the default one. Raises RequestInvalid."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{0,64}", name, re.ASCII):
        raise RequestInvalid("not the name of a collection", field="collection", bound="1-64 of [A-Za-z0-9_-]")
    return name


def _mistake(text: str, within: str) -> RequestInvalid:
    match = _PATH.match(text)
    assert match is not None  # every part of the pattern may be empty
    what, path = match["what"], (match["path"] or "").removeprefix("$").removeprefix(".")
    if named := _NAMED.search(what):
        path = ".".join(part for part in (path, named["name"][:64]) if part)
    field = ".".join(part for part in (within, path) if part) or "body"
    return RequestInvalid(what[:200], field=field, bound=what[:200])


def _refuse_nul(value: Body, within: str) -> None:
    """No store keeps NUL in text, so none gets in. (A document's text is bytes to us; what it is, retrieval decides.)"""
    for field in value.__struct_fields__:
        if field != "text" and isinstance(text := getattr(value, field), str) and "\0" in text:
            raise RequestInvalid(f"{field} contains a NUL character", field=f"{within}.{field}" if within else field, bound="no NUL")


def _require_text(text: str, field: str) -> None:
    bound = f"1-{QUESTION_BYTES_MAX} bytes of UTF-8, not only white space"
    if not text.strip():
        raise RequestInvalid(f"the {field} is empty", field=field, bound=bound)
    if len(text.encode()) > QUESTION_BYTES_MAX:
        raise RequestInvalid(f"the {field} is too long", field=field, bound=bound)


def _set_fact(value: Value, fact: str | float | bool) -> None:
    if isinstance(fact, bool):
        value.bool_value = fact
    elif isinstance(fact, str):
        value.string_value = fact
    else:
        value.number_value = fact


def _struct(value: dict[str, Any], field: str) -> Struct:
    if _depth(value) > SCHEMA_DEPTH_MAX:
        raise RequestInvalid(f"{field} is nested too deep", field=field, bound=f"at most {SCHEMA_DEPTH_MAX} levels")
    struct = Struct()
    try:
        struct.update(value)
    except (ValueError, TypeError, OverflowError):
        raise RequestInvalid(
            f"{field} holds a value that cannot be kept", field=field, bound="JSON with numbers of double precision"
        ) from None
    return struct


def _depth(value: object) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        deepest = max(deepest, depth)
        if depth > SCHEMA_DEPTH_MAX:
            break
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting += [(child, depth + 1) for child in children if isinstance(child, dict | list)]
    return deepest
