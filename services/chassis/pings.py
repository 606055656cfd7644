"""How a peer that stands still is noticed: stopped, frozen with its machine, or behind a line that was cut, it closes no connection.

gRPC's own figures are for peers that are far away, and of those it takes, two do nothing as they are documented. Which ones work was seen
with a process under SIGSTOP.
"""

from collections.abc import Iterable
from typing import Any

Option = tuple[str, Any]


def with_pings(options: Iterable[Option], *, every_s: float, answer_within_s: float) -> list[Option]:
    """`options` of a channel or server that breaks off a connection which was silent for `every_s` and then does not answer a ping in time.

    The other side has to allow as many: see LEAST_BETWEEN_PINGS_S.
    """
    pings = {
        "grpc.keepalive_time_ms": int(every_s * 1000),
        # `grpc.keepalive_timeout_ms` is what is documented; what is waited is this, and a minute if it is not set.
        "grpc.http2.ping_timeout_ms": int(answer_within_s * 1000),
        # Otherwise one of ours that reads and has nothing to send may ask twice, and then once a minute at the most.
        "grpc.http2.max_pings_without_data": 0,
        "grpc.keepalive_permit_without_calls": 1,
    }
    return [*(option for option in options if option[0] not in pings), *pings.items()]


LEAST_BETWEEN_PINGS_S = 2.0
"""What a server allows. More often is taken for an attack."""
