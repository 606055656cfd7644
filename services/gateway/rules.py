"""Who may call what: one table for every HTTP route and every RPC of the edge. It knows no endpoint and decides nothing about objects.

A route or RPC that is not in the table cannot be served: looking its rule up fails when the process starts.
"""

from dataclasses import dataclass

from services.chassis.errors import NotAllowed
from services.chassis.principal import Principal
from services.gateway.limiter import Kind


@dataclass(frozen=True, slots=True)
class Rule:
    """What a caller needs."""

    role: str = ""
    """The role; empty = any."""
    scope: str = ""
    """What a narrowed API key must have been made for; empty = nothing in particular."""
    limited: bool = False
    """Whether it counts towards the plan's request limit. What neither does nor `answers` is a read, of which a plan gives many more."""
    answers: bool = False
    """Whether all limits of the plan must admit it, and is turned away first when there is too much to do. Its endpoint asks, since it
    knows how much is wanted."""
    open: bool = False
    """Whether anybody may call, unknown callers too."""

    @property
    def counts(self) -> Kind | None:
        """What it counts as before its endpoint runs; None if its endpoint sees to that, or if nobody is known who could be counted."""
        if self.open or self.answers:
            return None
        return Kind.REQUESTS if self.limited else Kind.READS

    def check(self, principal: Principal) -> None:
        """Raise NotAllowed unless `principal` satisfies the rule."""
        if self.role:
            principal.require(self.role)
        elif not principal.roles:
            raise NotAllowed("a role is needed", needs="user")
        if self.scope:
            principal.require_scope(self.scope)


OPEN = Rule(open=True)
ANY_MEMBER = Rule()
ASK = Rule(scope="answers", answers=True)
ANSWERS = Rule(scope="answers")
SEARCH = Rule(scope="search", limited=True)
READ = Rule(scope="documents:read")
UPLOAD = Rule(scope="documents:write", limited=True)
WRITE = Rule(scope="documents:write")
RECORDS = Rule(scope="records")
ADMIN = Rule(role="admin", scope="admin")

ROUTE_RULES = {
    "POST /v1/answers": ASK,
    "GET /v1/answers/{id}": ANSWERS,
    "GET /v1/answers/{id}/events": ANSWERS,
    "POST /v1/answers/{id}/cancel": ANSWERS,
    "POST /v1/answers/{id}/tool-calls/{call_id}": ANSWERS,
    "GET /v1/answers/{id}/prompts": ADMIN,
    "GET /v1/answers/ws": ANSWERS,
    "GET /v1/models": ANSWERS,
    "POST /v1/documents": UPLOAD,
    "POST /v1/documents:bulk": UPLOAD,
    "GET /v1/documents": READ,
    "GET /v1/collections": READ,
    "GET /v1/documents/{id}": READ,
    "DELETE /v1/documents/{id}": WRITE,
    "GET /v1/jobs": READ,
    "GET /v1/jobs/{id}": READ,
    "POST /v1/jobs/{id}/cancel": WRITE,
    "POST /v1/jobs/{id}/retry": WRITE,
    "POST /v1/search": SEARCH,
    "GET /v1/operations": RECORDS,
    "GET /v1/operations:watch": RECORDS,
    "GET /v1/operations/{id}": RECORDS,
    "GET /v1/usage": RECORDS,
    "GET /v1/sessions": RECORDS,
    "GET /v1/sessions:export": RECORDS,
    "GET /v1/sessions/{id}": RECORDS,
    "PATCH /v1/sessions/{id}": RECORDS,
    "DELETE /v1/sessions/{id}": RECORDS,
    "GET /v1/sessions/{id}/export": RECORDS,
    "GET /v1/infrastructure": RECORDS,
    "POST /v1/session": OPEN,
    "GET /v1/session": ANY_MEMBER,
    "DELETE /v1/session": OPEN,
    "GET /v1/admin/plans": ADMIN,
    "POST /v1/admin/plans": ADMIN,
    "PUT /v1/admin/plans/{name}": ADMIN,
    "GET /v1/admin/subscriptions/{user}": ADMIN,
    "PUT /v1/admin/subscriptions/{user}": ADMIN,
    "DELETE /v1/admin/subscriptions/{user}": ADMIN,
    "GET /v1/admin/budgets/{scope}/{id}": ADMIN,
    "PUT /v1/admin/budgets/{scope}/{id}": ADMIN,
    "DELETE /v1/admin/budgets/{scope}/{id}": ADMIN,
    "GET /v1/admin/prices": ADMIN,
    "PUT /v1/admin/prices": ADMIN,
    "POST /v1/admin/prices": ADMIN,
    "GET /v1/admin/api-keys": ADMIN,
    "POST /v1/admin/api-keys": ADMIN,
    "DELETE /v1/admin/api-keys/{id}": ADMIN,
    "POST /v1/admin/revocations": ADMIN,
    "DELETE /v1/admin/revocations/{kind}/{id}": ADMIN,
    "GET /v1/admin/users": ADMIN,
    "POST /v1/admin/users": ADMIN,
    "PUT /v1/admin/users/{user}": ADMIN,
    "DELETE /v1/admin/users/{user}": ADMIN,
    "GET /v1/admin/users/{user}/export": ADMIN,
    "GET /healthz": OPEN,
    "GET /readyz": OPEN,
    "GET /metrics": OPEN,
}

RPC_RULES = {
    "Answer": ASK,
    "ResumeAnswer": ANSWERS,
    "CancelAnswer": ANSWERS,
    "ConfirmToolCall": ANSWERS,
    "GetPrompts": ADMIN,
    "ListModels": ANSWERS,
    "Search": SEARCH,
    "IngestDocuments": UPLOAD,
    "GetIngestionJob": READ,
    "WatchIngestionJob": READ,
    "ListIngestionJobs": READ,
    "CancelIngestionJob": WRITE,
    "RetryIngestionJob": WRITE,
    "ListDocuments": READ,
    "ListCollections": READ,
    "DeleteDocument": WRITE,
    "GetOperation": RECORDS,
    "ListOperations": RECORDS,
    "QueryUsage": RECORDS,
}
