"""Tailrace for Python: ask, and get a streamed, cited, priced answer. Depends on grpcio and protobuf alone.

    async with tailrace.AsyncClient("localhost:50050", token=token) as client:
        async for piece in client.answer("How long is a token valid?").text():
            print(piece, end="")

The generated messages of the contract live beside this file; the common path needs none of them.
"""

from tailrace.client import Answer, AsyncClient, BlockingAnswer, Client, Upload
from tailrace.errors import (
    AnswerCancelled,
    BudgetExhausted,
    Conflict,
    DeadlineExceeded,
    Interrupted,
    ModelFailed,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    RateLimited,
    RequestInvalid,
    ServerFailed,
    TailraceError,
    Unavailable,
)
from tailrace.values import (
    Accepted,
    CacheVerdict,
    Citation,
    Delta,
    Document,
    Event,
    FinalAnswer,
    Job,
    Operation,
    Passage,
    Passages,
    Progress,
    Receipt,
    Step,
    ToolCall,
    ToolResult,
    Usage,
    UsageRow,
)

__all__ = [
    "Accepted",
    "Answer",
    "AnswerCancelled",
    "AsyncClient",
    "BlockingAnswer",
    "BudgetExhausted",
    "CacheVerdict",
    "Citation",
    "Client",
    "Conflict",
    "DeadlineExceeded",
    "Delta",
    "Document",
    "Event",
    "FinalAnswer",
    "Interrupted",
    "Job",
    "ModelFailed",
    "NotAllowed",
    "NotAuthenticated",
    "NotFound",
    "Operation",
    "Passage",
    "Passages",
    "Progress",
    "RateLimited",
    "Receipt",
    "RequestInvalid",
    "ServerFailed",
    "Step",
    "TailraceError",
    "ToolCall",
    "ToolResult",
    "Unavailable",
    "Upload",
    "Usage",
    "UsageRow",
]
